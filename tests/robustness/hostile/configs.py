"""C: params.json and config.json, and weights that do not fit them."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .case import ACCEPTED, MiB, Variant, case, model
from .gguf import llama_bytes
from .models import (
    CONFIG,
    DH,
    GGUF_NAMES,
    PARAMS,
    D,
    F,
    H,
    hf_folder,
    hf_weights,
    meta_folder,
    renamed,
    weights,
)
from .torch import pth_bytes


class Literal(float):
    """A number written into JSON as it is spelled: NaN, 1e308, 1e-300."""

    def __new__(cls, text: str):
        self = super().__new__(cls, 0)
        self.text = text
        return self


def json_bytes(values: dict) -> bytes:
    """JSON, with the literals as they are."""
    literals = {f"<<{key}>>": value for key, value in values.items() if isinstance(value, Literal)}
    out = json.dumps({k: f"<<{k}>>" if isinstance(v, Literal) else v for k, v in values.items()})
    for mark, value in literals.items():
        out = out.replace(f'"{mark}"', value.text)
    return out.encode()


MISSING = object()


def params(folder: Path, name: str, changes: dict, *expected: str, tensors=None, **options) -> Variant:
    """Meta's folder with some values changed; what the message must say is the first of these keys."""
    values = {k: v for k, v in (PARAMS | changes).items() if v is not MISSING}
    pth = None if tensors is None else pth_bytes(tensors)
    path = meta_folder(folder / f"{sum(1 for _ in folder.iterdir())}", json_bytes(values), pth)
    return model(name, path, *expected, **{"says": tuple(changes)[:1]} | options)


def config(folder: Path, name: str, changes: dict | bytes, *expected: str, tensors=None, **options):
    """A Hugging Face folder with some values changed, or with this text."""
    path = folder / f"{sum(1 for _ in folder.iterdir())}"
    if isinstance(changes, dict):
        values = {k: v for k, v in (CONFIG | changes).items() if v is not MISSING}
        changes = json_bytes(values)
    return model(name, hf_folder(path, changes, tensors), *expected, **options)


def shown(value: object) -> str:
    return value.text if isinstance(value, Literal) else json.dumps(value)


# ---------------------------------------------------------------- params.json


@case("C01", "n_heads that is no number of heads")
def n_heads(folder: Path) -> Iterator[Variant]:
    for value in (0, -1, 2.5, "32", True, None):
        says = ("n_heads", "null" if value is None else str(value))
        if value is None:
            says = ("n_heads",)
        yield params(folder, shown(value), {"n_heads": value}, "ConfigError", says=says)
    yield params(folder, "missing", {"n_heads": MISSING}, "ConfigError")


@case("C02", "heads that divide nothing")
def divisions(folder: Path) -> Iterator[Variant]:
    for name, changes in [
        ("dim % n_heads", {"n_heads": 3, "n_kv_heads": 3}),
        ("n_heads % n_kv_heads", {"n_kv_heads": 3, "n_heads": 4}),
        ("n_kv_heads > n_heads", {"n_kv_heads": 4}),
    ]:
        yield params(folder, name, changes, "ConfigError")


@case("C03", "vocab_size -1")
def vocab_from_embedding(folder: Path) -> Iterator[Variant]:
    yield params(folder, "as Llama 1 and 2 have it", {"vocab_size": -1}, ACCEPTED)


@case("C04", "a vocab_size that cannot be")
def vocab_size(folder: Path) -> Iterator[Variant]:
    for value in (0, -2, 1 << 40):
        yield params(
            folder, str(value), {"vocab_size": value}, "ConfigError", says=("vocab_size", str(value))
        )


@case("C05", "sizes beyond all sense")
def sizes(folder: Path) -> Iterator[Variant]:
    numbers = [("n_layers", 10**9), ("dim", 1 << 31), ("multiple_of", 0)]
    numbers += [("ffn_dim_multiplier", Literal(text)) for text in ("-1", "1e308", "1e999")]
    for key, value in numbers:
        errors = ("ConfigError", "ResourceLimitError")
        yield params(folder, f"{key} {shown(value)}", {key: value}, *errors, seconds=0.1)
    for text in ("NaN", "Infinity"):  # not JSON at all
        yield params(
            folder,
            f"ffn_dim_multiplier {text}",
            {"ffn_dim_multiplier": Literal(text)},
            "ConfigError",
            "FormatError",
            seconds=0.1,
            says=(text,),
        )


@case("C06", "norm_eps that is none")
def norm_eps(folder: Path) -> Iterator[Variant]:
    for value in (0, 0.0, -1, "1e-5"):
        yield params(folder, shown(value), {"norm_eps": value}, "ConfigError")
    yield params(folder, "NaN", {"norm_eps": Literal("NaN")}, "ConfigError", "FormatError", says=("NaN",))


@case("C07", "rope_theta that is none")
def rope_theta(folder: Path) -> Iterator[Variant]:
    for value in (0, -1, Literal("1e-300"), Literal("1e999")):
        yield params(folder, shown(value), {"rope_theta": value}, "ConfigError")
    for text in ("NaN", "Infinity"):
        errors = ("ConfigError", "FormatError")
        yield params(folder, text, {"rope_theta": Literal(text)}, *errors, says=(text,))


# ---------------------------------------------------------------- config.json


@case("C08", "head_dim: odd, or not dim / n_heads")
def head_dim(folder: Path) -> Iterator[Variant]:
    for value in (15, 16):
        wide = hf_weights() | {
            f"model.layers.0.self_attn.{name}_proj.weight": np.ones(shape, np.float32)
            for name, shape in [
                ("q", (4 * value, D)),
                ("k", (2 * value, D)),
                ("v", (2 * value, D)),
                ("o", (D, 4 * value)),
            ]
        }
        changes = {"head_dim": value, "num_attention_heads": 4, "num_key_value_heads": 2}
        expected = "ConfigError" if value % 2 else ACCEPTED
        yield config(folder, f"head_dim {value}, not {D // 4}", changes, expected, tensors=wide)


@case("C09", "a rope_scaling that cannot be")
def rope_scaling(folder: Path) -> Iterator[Variant]:
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    ones = [1.0] * (DH // 2)
    longrope = {"rope_type": "longrope", "short_factor": ones, "long_factor": ones}
    longrope["original_max_position_embeddings"] = 64
    for kind in (llama3, yarn, longrope):
        yield config(folder, f"{kind['rope_type']} in order", {"rope_scaling": kind}, ACCEPTED)
    for name, value in [
        ("an unknown type", llama3 | {"rope_type": "spiral"}),
        ("factor 0", llama3 | {"factor": 0.0}),
        ("linear, factor 0", {"type": "linear", "factor": 0}),
        ("equal frequencies", llama3 | {"high_freq_factor": 1.0}),
        ("a list", [1, 2]),
        ("no original length", {k: v for k, v in llama3.items() if not k.startswith("original")}),
        ("no factor", {k: v for k, v in llama3.items() if k != "factor"}),
        ("yarn, a ramp that falls", yarn | {"beta_fast": 1.0, "beta_slow": 32.0}),
        ("yarn, a length of 0", yarn | {"attention_factor": 0.0}),
        ("longrope, 100,000 numbers", longrope | {"long_factor": [1.0] * 100_000}),
        ("longrope, none", longrope | {"short_factor": []}),
        ("longrope, a 0 among them", longrope | {"short_factor": [0.0, *ones[1:]]}),
        ("longrope, a text among them", longrope | {"short_factor": ["1", *ones[1:]]}),
    ]:
        yield config(folder, name, {"rope_scaling": value}, "ConfigError")


@case("C10", "JSON that nobody should read")
def bad_json(folder: Path) -> Iterator[Variant]:
    good = json_bytes(CONFIG)
    for name, data in [
        ("nested 50,000 deep", good[:-1] + b', "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
        ("a key twice", good[:-1] + b', "hidden_size": 64}'),
        ("NaN", good.replace(b"1e-05", b"NaN")),
        ("UTF-16", good.decode().encode("utf-16")),
        ("a byte order mark", b"\xef\xbb\xbf" + good),
        ("a number of 5,000 digits", good[:-1] + b', "x": ' + b"9" * 5000 + b"}"),
        ("a list", b"[]"),
        ("nothing", b""),
    ]:
        yield config(folder, name, data, "FormatError", names="config.json")
    spaces = config(folder, "a gigabyte of spaces", b"", "FormatError", names="config.json", room=64 * MiB)
    with open(folder / f"{sum(1 for _ in folder.iterdir()) - 1}" / "config.json", "wb") as file:
        for _ in range(1024):
            file.write(b" " * MiB)
    yield spaces


@case("C11", "another model")
def other_models(folder: Path) -> Iterator[Variant]:
    for name, changes in [
        ("Mistral", {"architectures": ["MistralForCausalLM"]}),
        ("bert", {"model_type": "bert"}),
        ("aqlm", {"quantization_config": {"quant_method": "aqlm", "bits": 4}}),
    ]:
        yield config(folder, name, changes, "UnsupportedError", says=(name,))
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    for window in (1, 10**18, None):
        yield config(folder, f"Mistral, a window of {window}", mistral | {"sliding_window": window}, ACCEPTED)
    for window in (0, -(2**63), 10**30, 2.5, "4096", True, [4096]):
        changes = mistral | {"sliding_window": window}
        yield config(
            folder, f"Mistral, a window of {window}", changes, "ConfigError", says=("sliding_window",)
        )
    phi3 = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
    for name, value in [
        ("partial_rotary_factor", 0.75),
        ("attention_bias", True),
        ("model_type", "phi3small"),
    ]:
        yield config(folder, f"Phi-3, {name}", phi3 | {name: value}, "UnsupportedError", says=(name,))
    yield config(folder, "Phi-3 without its fused tensors", phi3, "MismatchError", says=("qkv_proj",))


# ---------------------------------------------------------------- against the weights


@case("C12", "sizes that the weights do not have")
def against_weights(folder: Path) -> Iterator[Variant]:
    yield config(
        folder,
        "intermediate_size",
        {"intermediate_size": F + 32},
        "MismatchError",
        says=(str(F + 32), str(F)),
    )
    values = hf_weights()
    two_layers = values | {key.replace("layers.0", "layers.1"): value for key, value in values.items()}
    yield config(
        folder, "a layer missing", {"num_hidden_layers": 2}, "MismatchError", says=("layers.1", "missing")
    )
    yield config(folder, "a layer too many", {}, "MismatchError", tensors=two_layers, says=("layers.1",))
    yield params(folder, "w1 of Meta's", {"multiple_of": 64}, "MismatchError", says=("w1",))


@case("C13", "weights of another shape")
def shapes(folder: Path) -> Iterator[Variant]:
    name = "model.layers.0.self_attn.q_proj.weight"
    narrow = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": DH}
    values = hf_weights()
    layer = "model.layers.0.self_attn."
    values[layer + "q_proj.weight"] = np.ones((D, DH), np.float32)  # (DH, D) is wanted
    values[layer + "o_proj.weight"] = np.ones((D, DH), np.float32)
    yield config(folder, "wq transposed", narrow, "MismatchError", tensors=values, says=(name,))
    values = hf_weights() | {layer + "k_proj.weight": np.ones((H * DH, D), np.float32)}
    says = ("k_proj", str((H * DH, D)), str((DH, D)))
    yield config(folder, "k_proj of MHA", {}, "MismatchError", tensors=values, says=says)
    values = hf_weights()
    del values["lm_head.weight"]
    yield config(folder, "no lm_head", {}, "MismatchError", tensors=values, says=("lm_head", "missing"))


@case("C14", "weights that are no numbers")
def not_finite(folder: Path) -> Iterator[Variant]:
    def spoiled(name: str, value: float, where=(0,)) -> dict[str, np.ndarray]:
        values = weights()
        values[f"{name}.weight"][where] = value
        return values

    for what, values, expected in [
        ("NaN in wo", spoiled("layers.0.attention.wo", np.nan, (3, 5)), "NumericsError"),
        ("infinity in a norm", spoiled("layers.0.ffn_norm", np.inf), "NumericsError"),
        ("infinity in the last norm", spoiled("norm", np.inf), "NumericsError"),
        ("NaN in the output", spoiled("output", np.nan, (3, 5)), "NumericsError"),
        ("an embedding of zeros", spoiled("tok_embeddings", 0.0, ...), ACCEPTED),  # its logits are finite
    ]:
        path = folder / f"{what.replace(' ', '-')}.gguf"
        path.write_bytes(llama_bytes(tensors=renamed(values, GGUF_NAMES, "blk")))
        yield model(f"GGUF, {what}", path, expected, names="")
        yield params(folder, f"Meta, {what}", {}, expected, tensors=values, says=(), names="")
