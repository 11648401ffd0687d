"""Models of other kinds, by the names in their files: for messages only. Nothing here runs them.

`not_models` names files by their first bytes.
"""

import re
from collections.abc import Iterable
from typing import Any

from ..errors import escape

NOTHING = "nothing here runs it"
SAME = "if it is a LLaMA, its safetensors or GGUF runs here"

# (model_type in config.json or general.architecture in a GGUF, the kind of model). The first that matches
# from the beginning of the name counts, whatever its capitals and with - for _.
ARCHITECTURES = [
    (r"whisper|wav2vec|hubert|moonshine|parakeet|seamless|speech", "a model for speech"),
    (r"gemma-embedding|gemma3-text-embedding|llama-embed", "an embedding model"),
    (r".*bert|.*roberta|electra|mpnet|xlnet", "an encoder of the BERT kind, for embeddings or classes"),
    (r"u?m?t5|m?bart$|pegasus|marian|m2m|nllb|led$", "an encoder-decoder (T5, BART)"),
    (r"sd\d|sdxl|flux|stable-diffusion|unet|ltxv|wan$|hyvid|hidream|lumina|aura|cosmos", "a diffusion model"),
    (r"clip|siglip|vit|dino|swin|convnext|resnet|detr|sam\d?$", "a vision model, or the vision part of one"),
    (r"mllama|llava|idefics|smolvlm|paligemma|pixtral|internvl|blip", "a model for pictures"),
    (r"qwen.*(vl|omni|audio)|minicpm-?v|phi3-v|phi4-multimodal|phi4mm", "a model for pictures or sound"),
    (r"qwen", "a Qwen"),
    (r"gemma|recurrent-gemma", "a Gemma"),
    (r"phi$|phi2|phi-msft|mixformer", "a Phi-1 or Phi-2"),
    (r"phi3?moe|phi3small|phi4flash", "a Phi of another architecture than Phi-3"),
    (r"gpt2|gpt-bigcode", "a GPT-2"),
    (r"gpt-?neox?|gpt-?j", "a GPT-Neo or GPT-J"),
    (r"gpt-oss", "a gpt-oss"),
    (r"llama4", "a Llama 4, a mixture of experts"),
    (r"mixtral", "a Mixtral, a mixture of experts"),
    (r"deepseek|kimi|minimax|dbrx|grok|arctic|hunyuan|ernie", "a mixture of experts"),
    (r"mamba|falcon-?mamba|rwkv|jamba|lfm\d|bamba|zamba|granitehybrid", "a recurrent model (Mamba, RWKV)"),
    (r"bitnet", "a BitNet"),
    (r"falcon|mpt$|bloom|opt$|starcoder|codegen|stablelm|persimmon", "a language model of another kind"),
    (r"granite|olmo|cohere|command-?r|internlm|chatglm|glm|baichuan", "a language model of another kind"),
    (r"minicpm|exaone|nemotron|orion|plamo|smollm3|xverse|apertus", "a language model of another kind"),
]

# What else than a language model a class of transformers for LLaMA or Mistral is.
CLASSES = [
    (r"\w+For(Sequence|Token)Classification|\w+RewardModel", "a classifier or a model of rewards"),
    (r"\w+ForQuestionAnswering", "a model that marks answers in a text"),
    (r"(Llama|Mistral)(Bidirectional)?Model", "a model without an output matrix, for embeddings"),
]

# (a file of the folder, what the folder is and the way out); the first that matches a whole name counts.
FOLDERS = [
    (r"model_index\.json", f"a diffusion model (diffusers): {NOTHING}"),
    (
        r"modules\.json|config_sentence_transformers\.json",
        f"an embedding model (sentence-transformers): {NOTHING}",
    ),
    (r".*\.(mlpackage|mlmodelc)(/.*)?|.*\.mlmodel", f"a CoreML model: {SAME}"),
    (r"(.*/)?[^/]*\.onnx|onnx", f"an ONNX export: {SAME}"),
    (r"openvino_model\.xml", f"an OpenVINO export: {SAME}"),
    (r"tf_model.*\.h5|saved_model\.pb|model\.ckpt.*|.*\.tflite", f"weights of TensorFlow: {SAME}"),
    (r"flax_model.*\.msgpack", f"weights of Flax (JAX): {SAME}"),
    (r"weights(\.\d+)?\.npz", f"weights of MLX: {SAME}"),
    (r"qmodel\.pt", f"weights that HQQ quantized: {SAME}"),
    (r"output(-\d+-of-\d+)?\.safetensors|measurement\.json", f"weights that ExLlama quantized: {SAME}"),
]


def other_architecture(name: object) -> str | None:
    """The name and what such a model is, if it is known to be none that runs here."""
    if not isinstance(name, str):
        return None
    plain = name.lower().replace("_", "-")
    what = next((what for begins, what in ARCHITECTURES if re.match(begins, plain)), None)
    return None if what is None else f"{escape(name, 60)}, {what}: {NOTHING}"


def other_config(values: dict[str, Any]) -> str | None:
    """What a model with these values in config.json is, if it is known to be none that runs here."""
    if known := other_architecture(values.get("model_type")):
        return f"model_type {known}"
    classes = values.get("architectures")
    for name in [*(classes if isinstance(classes, list) else []), values.get("_class_name")]:
        if isinstance(name, str):
            what = next((what for pattern, what in CLASSES if re.fullmatch(pattern, name)), None)
            what = "a part of a diffusion model" if "_diffusers_version" in values else what
            if what is not None:
                return f"architectures has {escape(name, 60)}, {what}: {NOTHING}"
    return None


def other_folder(names: Iterable[str]) -> str | None:
    """What a folder or a repository with these files is, and the way out; None if it is nothing known."""
    names = list(names)
    for pattern, what in FOLDERS:
        if any(re.fullmatch(pattern, name) for name in names):
            return what
    return None
