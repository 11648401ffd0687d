"""The readers that are fuzzed: valid files to start with, and the calls that read a changed file.

For any bytes, a reader may raise only a NumpyLlamaError, in limited time and with a printable message:

    attempt(READERS["gguf"], data)
"""

import atexit
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from helpers.gguf_writer import gguf_bytes, llama_metadata, llama_tensors
from helpers.tiny_models import float_weights
from robustness.hostile import gguf, models, quantized, quantized_floats, safetensors, tokenizers, torch

import numpy_llama as nl
from numpy_llama.backend.formats import FORMATS, StoredTensor
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.checkpoint.pytorch.file import TorchFile
from numpy_llama.checkpoint.safetensors_file import SafetensorsFile
from numpy_llama.errors import NumpyLlamaError
from numpy_llama.proof.tiny import TINY_BLOCKS
from numpy_llama.text.chat import ChatTemplate

MAX_MESSAGE = 800  # characters: our own, and up to three texts of 200 from a file
SECONDS = 4.0  # of CPU time for one file: two for the reader, and two because the fuzzer counts branches
SIZES = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 32, "vocab_size": 8}
TINY = replace(TINY_BLOCKS, **SIZES, max_seq_len=16)


@dataclass(frozen=True)
class Reader:
    """`seeds` are valid inputs, `file` is the name of the file, and `use` reads it as a user does."""

    seeds: Callable[[], Iterator[bytes]]
    file: str
    use: Callable[[Path], None]
    wrap: Callable[[bytes], bytes] = lambda data: data  # from the input to the file's bytes
    beside: Callable[[Path], None] = lambda folder: None  # writes the other files of the folder
    words: str = ""  # that such files consist of


def attempt(reader: Reader, data: bytes) -> None:
    """Read and use a file. Another error than a NumpyLlamaError is a failure; so is more than SECONDS."""
    path = _folder(reader) / reader.file
    path.write_bytes(reader.wrap(data))
    began = time.process_time()
    _allow_refusal(lambda: reader.use(path))
    if (seconds := time.process_time() - began) > SECONDS:
        raise TimeoutError(f"{seconds:.1f} s for {len(data)} bytes")


def _allow_refusal(use: Callable[[], object]) -> None:
    try:
        use()
    except NumpyLlamaError as error:
        message = str(error)
        if len(message) > MAX_MESSAGE or not (message.isascii() and message.isprintable()):
            raise ValueError(f"the message cannot be printed: {message!a}") from None


@cache
def _folder(reader: Reader) -> Path:
    warnings.simplefilter("error")
    folder = _new_folder()
    reader.beside(folder)
    return folder


def _new_folder() -> Path:
    """In memory if possible, because every input is written to it."""
    folder = tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _use_model(path: Path) -> None:
    """Read each part of a model, also after another part was refused."""
    checkpoint = open_checkpoint(path)
    _allow_refusal(lambda: checkpoint.args)
    _allow_refusal(lambda: _read_all(checkpoint.weights().values()))
    _allow_refusal(lambda: _encode(checkpoint.tokenizer()))
    _allow_refusal(checkpoint.chat_format)


def _use_tensors(file: SafetensorsFile | TorchFile) -> None:
    for name in file.tensors:
        _allow_refusal(lambda name=name: _read_all([file.tensor(name)]))


def _use_folder(path: Path) -> None:
    _use_model(path.parent)


def _use_tokenizer(path: Path) -> None:
    _encode(nl.load_tokenizer(path))


def _use_torch(path: Path) -> None:
    file = TorchFile(path)
    _use_tensors(file)
    _allow_refusal(file.verify)


def _read_all(tensors) -> None:
    for tensor in tensors:
        with np.errstate(all="ignore"):  # any bits are numbers
            tensor.realize().dequantize()


def _encode(tokenizer: nl.Tokenizer) -> None:
    text = "a b\u00e9 \u4e16  aaaa"
    _allow_refusal(lambda: tokenizer.decode(tokenizer.encode(text, bos=True)))
    for token in range(min(tokenizer.vocab_size, 40)):
        tokenizer.piece(token)


# ---------------------------------------------------------------- models


def _ggufs() -> Iterator[bytes]:
    weights = float_weights(TINY)
    for format in ("F16", "Q8_0", "Q4_0"):
        yield gguf_bytes(llama_metadata(TINY), llama_tensors(TINY, weights, format))
    block = {
        name: StoredTensor(format, (1, format.block), np.zeros(format.block_bytes, np.uint8))
        for name, format in FORMATS.items()
    }
    yield gguf_bytes({"general.architecture": "llama", "general.alignment": 64}, block)
    for byte_level in (False, True):
        values = gguf.metadata(byte_level, tokenizer__chat_template="{{ messages[0].content }}")
        yield gguf.file_bytes(values, [])


def _llama2cs() -> Iterator[bytes]:
    numbers = np.array([32, 32, 1, 2, 1, 8, 16], "<i4")
    angles, rows = 2 * 16 * 8, 2 * 8 * 32 + 3 * 32 + 32 * (32 + 2 * 16 + 32) + 3 * 32 * 32
    for vocab_size in (8, -8):
        numbers[5] = vocab_size
        n = rows + angles - (0 if vocab_size < 0 else 8 * 32)
        yield numbers.tobytes() + np.full(n, 0.25, "<f4").tobytes()
    numbers[5] = 8
    head = b"24ka" + np.array([1], "<i4").tobytes() + numbers.tobytes() + b"\0"
    yield head.ljust(256, b"\0") + np.full(rows, 0.25, "<f4").tobytes()
    head = (
        b"24ka" + np.array([2], "<i4").tobytes() + numbers.tobytes() + b"\0" + np.array([32], "<i4").tobytes()
    )
    groups = (rows - 3 * 32) // 32
    yield head.ljust(256, b"\0") + np.full(96 + groups * 9, 0.25, "<f4").tobytes()


def _safetensors() -> Iterator[bytes]:
    values = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float16), "c": np.zeros(0, np.float64)}
    whole = safetensors.safetensors_bytes(values)
    yield whole
    yield whole[8:].replace(b"}}", b"}}\0", 1)
    yield b'{"__metadata__":{"format":"pt"},"x":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}\0abcd'


def _with_length(data: bytes) -> bytes:
    """Put the header's length before an input `header, zero byte, data`. Another input is a whole file."""
    if not data.startswith(b"{"):
        return data
    header, _, body = data.partition(b"\0")
    return safetensors.with_header(header, body)


def _tensors() -> dict[str, np.ndarray]:
    return {"a.weight": np.ones((2, 2), np.float32), "b": np.arange(4, dtype=np.float32)}


def _pths() -> Iterator[bytes]:
    yield torch.pth_bytes(_tensors())
    yield torch.legacy_bytes(_tensors())


def _pickles() -> Iterator[bytes]:
    yield torch.pickled(torch.state_dict(_tensors()))
    transposed = torch.tensor(torch.storage("0", 4), (2, 2), (1, 2))
    for call in ("torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter"):
        made = torch.call(torch.name(*call.rsplit(".", 1)), transposed, b"\x88", torch.ORDERED_DICT)
        yield torch.pickled(b"}" + torch.text("x") + made + b"s")


def _in_zip(pickle: bytes) -> bytes:
    return torch.zip_bytes(torch.records(pickle, [bytes(16), bytes(16)]))


def _params() -> Iterator[bytes]:
    scaled = {"use_scaled_rope": True, "ffn_dim_multiplier": 1.3, "max_seq_len": 64, "head_dim": 16}
    yield json.dumps(models.PARAMS).encode()
    yield json.dumps(models.PARAMS | scaled).encode()


def _meta_beside(folder: Path) -> None:
    (folder / "consolidated.00.pth").write_bytes(torch.pth_bytes(models.weights()))


def _configs() -> Iterator[bytes]:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    yield json.dumps(models.CONFIG).encode()
    more = {"rope_scaling": scaling | {"original_max_position_embeddings": 32}, "eos_token_id": [2]}
    yield json.dumps(models.CONFIG | more | {"head_dim": 16}).encode()
    yield json.dumps(models.CONFIG | {"rope_parameters": {"rope_type": "linear", "factor": 2}}).encode()
    for settings, _ in quantized.IN_ORDER.values():
        yield json.dumps(models.CONFIG | {"quantization_config": settings}).encode()


def _hf_beside(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(safetensors.safetensors_bytes(models.hf_weights()))


def _quantized() -> Iterator[bytes]:
    """Weights with float32 scales: all kinds are read with the settings of 4 bits or of FP8."""
    for kind in quantized_floats.KINDS:
        path = quantized_floats.in_order_of(_new_folder() / "model", kind) / "model.safetensors"
        yield path.read_bytes()[8:].replace(b"]}}", b"]}}\0", 1)


def _quantized_beside(kind: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        settings = {"quantization_config": quantized_floats.KINDS[kind][1]}
        (folder / "config.json").write_text(json.dumps(models.CONFIG | settings))

    return write


def _grouped(kind: str) -> "Reader":
    """The weights of a folder whose settings name this method."""
    settings, make = quantized.IN_ORDER[kind]

    def weights() -> Iterator[bytes]:
        path = quantized.folder_of(_new_folder(), settings, make) / "model.safetensors"
        yield path.read_bytes()[8:].replace(b"]}}", b"]}}\0", 1)

    def beside(folder: Path) -> None:
        config = models.CONFIG | {"quantization_config": settings}
        (folder / "config.json").write_text(json.dumps(config))

    return Reader(weights, "model.safetensors", _use_folder, _with_length, beside)


# ---------------------------------------------------------------- vocabularies, templates


def _tokenizer_jsons() -> Iterator[bytes]:
    yield tokenizers.tokenizer_json()
    vocabulary = {text: i for i, (text, _, _) in enumerate(models.sentencepieces())}
    added = [{"id": 0, "content": "<unk>", "special": True}]
    parts = {"vocab": vocabulary, "merges": ["a a", "aa aa"], "byte_fallback": True, "unk_token": "<unk>"}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    before = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]}
    value = json.loads(tokenizers.tokenizer_json(added_tokens=added, fuse_unk=True, **parts))
    yield json.dumps(value | {"normalizer": before, "pre_tokenizer": None}).encode()


TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m.content|trim }}"
    "{% if not loop.last %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}x{% endif %}",
    "{%- set ns = namespace(a=[]) -%}{%- for m in messages[1:] %}{%- set ns.a = ns.a + [m] %}{% endfor -%}"
    "{{ ns.a | tojson(indent=2) }}{{ raise_exception('no') if ns.a is defined and ns.a|length > 9 }}",
    "{% macro f(x, y=1) %}<{{ x ~ y }}>{% endmacro %}{{ f('a') * 3 }}{{ strftime_now('%d %b %Y') }}"
    "{% for k, v in {'a': 1}.items() %}{{ k.upper().replace('A', 'b') }}{% endfor %}",
    "{{ range(3)|map('string')|join(',') }}{{ messages|selectattr('role', 'equalto', 'user')|list|first }}",
]


def _use_template(path: Path) -> None:
    source = path.read_bytes().decode(errors="replace")
    ChatTemplate(source).encode(_some_tokenizer(), [{"role": "user", "content": "hi <s> you"}])


@cache
def _some_tokenizer() -> nl.Tokenizer:
    path = _new_folder() / "tokenizer.model"
    path.write_bytes(models.sentencepiece_model())
    return nl.load_tokenizer(path)


JINJA = (
    "{{ }} {% %} {%- -%} {# #} for in if elif else endif endfor set endset macro endmacro call endcall "
    "filter endfilter break continue is not and or recursive loop.index loop.last namespace( None true "
    "raise_exception( strftime_now( tojson join( replace( map( select( reject( sort( groupby( batch( "
    "slice( indent( wordwrap( format( center( urlize sum( min max unique .__class__ .__init__ |attr( "
    "cycler( joiner( lipsum( dict( range( ** // ~ [:: -1] 99999999 1e308 'a' \\n messages"
)
PICKLE = (
    "ctorch._utils\n_rebuild_tensor_v2\n ctorch._utils\n_rebuild_parameter\n ccollections\nOrderedDict\n "
    "ctorch\nHalfStorage\n ctorch\nBFloat16Storage\n ctorch\nSize\n cos\nsystem\n \x80\x02 \x8a\x01 X\x01 "
    "( t R Q . } ] ) s u a e b N \x88 \x89 q\x01 h\x01 r j K\x01 M\x01\x01 J \x85 \x86 \x87 0 1 2"
)
STATE = (
    '"quant_type" "nf4" "fp4" "blocksize" "dtype" "bfloat16" "shape" "nested_blocksize" "nested_dtype" '
    '"nested_offset" .weight.absmax .weight.quant_map .weight.nested_absmax .weight.nested_quant_map .SCB '
    ".weight.quant_state.bitsandbytes__nf4 .weight_format .weight_scale .weight_scale_inv F8_E4M3 U8 I8 F32"
)

READERS = {
    "gguf": Reader(_ggufs, "model.gguf", _use_model),
    "safetensors": Reader(
        _safetensors, "a.safetensors", lambda path: _use_tensors(SafetensorsFile(path)), _with_length
    ),
    "bitsandbytes": Reader(
        _quantized, "model.safetensors", _use_folder, _with_length, _quantized_beside("4 bits"), words=STATE
    ),
    "fp8": Reader(_quantized, "model.safetensors", _use_folder, _with_length, _quantized_beside("FP8")),
    "torch": Reader(_pths, "a.pth", _use_torch),
    "pickle": Reader(_pickles, "a.pth", _use_torch, _in_zip, words=PICKLE),
    "llama2c": Reader(_llama2cs, "model.bin", _use_model),
    "params": Reader(_params, "params.json", _use_folder, beside=_meta_beside),
    "config": Reader(_configs, "config.json", _use_folder, beside=_hf_beside),
    "tokenizer_json": Reader(_tokenizer_jsons, "tokenizer.json", _use_tokenizer),
    "sentencepiece": Reader(lambda: iter([models.sentencepiece_model()]), "tokenizer.model", _use_tokenizer),
    "tiktoken": Reader(lambda: iter([tokenizers.tiktoken_model()]), "tokenizer.model", _use_tokenizer),
    **{kind: _grouped(kind) for kind in quantized.IN_ORDER},
    "template": Reader(lambda: (t.encode() for t in TEMPLATES), "template", _use_template, words=JINJA),
}
