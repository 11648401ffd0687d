"""Q: folders of GPTQ, AWQ and compressed-tensors, whose tensors and settings do not fit each other."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .case import ACCEPTED, Variant, case, model
from .models import CONFIG, DH, D, F, hf_folder, hf_weights
from .safetensors import safetensors_bytes

GROUP = 32
Tensors = dict[str, np.ndarray]
Q_PROJ, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"  # (32, 32) and (32, 96)

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}
MISSING = object()


def words(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-(1 << 31), 1 << 31, shape, np.int32)


def scales(*shape: int) -> np.ndarray:
    return np.full(shape, 1e-3, np.float16)


def gptq(N: int, K: int) -> Tensors:
    G = K // GROUP
    g_idx = np.arange(K, dtype=np.int32) // GROUP
    return {"qweight": words(K // 8, N), "qzeros": words(G, N // 8), "scales": scales(G, N), "g_idx": g_idx}


def awq(N: int, K: int) -> Tensors:
    G = K // GROUP
    return {"qweight": words(K, N // 8), "qzeros": words(G, N // 8), "scales": scales(G, N)}


def gemv(N: int, K: int) -> Tensors:
    return {"qweight": words(N, K // 8), "qzeros": words(N, 1), "scales": scales(N, 8)}


def compressed(N: int, K: int) -> Tensors:
    G = K // GROUP
    return {
        "weight_packed": words(N, K // 8),
        "weight_scale": scales(N, G),
        "weight_zero_point": words(N // 8, G),
        "weight_shape": np.array([N, K], np.int64),
    }


def folder_of(
    folder: Path,
    settings: Any,
    make: Callable[[int, int], Tensors],
    change: Callable[[Tensors], None] = lambda tensors: None,
    config: dict | None = None,
) -> Path:
    """A folder with every matrix of its layer quantized; `change` may then spoil its tensors."""
    tensors: Tensors = {}
    for name, w in hf_weights().items():
        if w.ndim == 1 or "layers" not in name:
            tensors[name] = w
            continue
        tensors |= {f"{name.removesuffix('weight')}{part}": x for part, x in make(*w.shape).items()}
    change(tensors)
    values = CONFIG | ({} if settings is MISSING else {"quantization_config": settings}) | (config or {})
    path = folder / f"{sum(1 for _ in folder.iterdir())}"
    return hf_folder(path, json.dumps(values).encode(), safetensors_bytes(tensors))


def tensor(
    folder: Path, method: str, part: str, value: Any, *expected: str, of: str = Q_PROJ, **options: Any
) -> Variant:
    """One tensor of a weight is replaced by `value`, or removed."""
    settings, make = IN_ORDER[method]

    def change(tensors: Tensors) -> None:
        tensors.pop(f"{of}.{part}", None)
        if value is not MISSING:
            tensors[f"{of}.{part}"] = value

    shown = "missing" if value is MISSING else f"{value.dtype}{list(value.shape)} {value.ravel()[:1]}"
    path = folder_of(folder, settings, make, change)
    says = options.pop("says", (of.rpartition(".")[2],))
    return model(
        f"{method} {part} {shown} {len(path.name)}{path.name}", path, *expected, says=says, **options
    )


def setting(
    folder: Path, base: dict, make: Callable[[int, int], Tensors], changes: dict, *expected: str, **options
) -> Variant:
    """Some settings have another value."""
    settings = {key: value for key, value in (base | changes).items() if value is not MISSING}
    path = folder_of(folder, settings, make)
    shown = {key: "missing" if value is MISSING else value for key, value in changes.items()}
    return model(f"{path.name} {str(shown)[:50]}", path, *expected, **options)


IN_ORDER = {
    "gptq": (GPTQ, gptq),
    "awq": (AWQ, awq),
    "gemv": (AWQ | {"version": "gemv"}, gemv),
    "packed": (PACKED, compressed),
}


@case("OK6", "quantized folders in order")
def in_order(folder: Path) -> Iterator[Variant]:
    for name, (settings, make) in IN_ORDER.items():
        yield model(name, folder_of(folder, settings, make), ACCEPTED)


# ---------------------------------------------------------------- tensors


@case("Q01", "packed numbers of another type")
def packed_type(folder: Path) -> Iterator[Variant]:
    for method, part, shape in [("gptq", "qweight", (4, 32)), ("awq", "qweight", (32, 4))]:
        for dtype in (np.float32, np.int64, np.uint8):
            yield tensor(folder, method, part, np.zeros(shape, dtype), "MismatchError")
    yield tensor(folder, "packed", "weight_packed", np.zeros((32, 4), np.float32), "MismatchError")


@case("Q02", "packed numbers that are no matrix")
def packed_axes(folder: Path) -> Iterator[Variant]:
    for shape in [(128,), (4, 32, 1), (0, 32), (4, 0), ()]:
        yield tensor(folder, "gptq", "qweight", words(*shape), "MismatchError")
        yield tensor(folder, "packed", "weight_packed", words(*shape), "MismatchError")


@case("Q03", "packed numbers of another length")
def packed_length(folder: Path) -> Iterator[Variant]:
    for shape in [(3, 32), (5, 32), (4, 24), (4, 31), (1, 32), (4096, 32)]:
        yield tensor(folder, "gptq", "qweight", words(*shape), "MismatchError")
    for shape in [(31, 4), (32, 3), (64, 4)]:
        yield tensor(folder, "awq", "qweight", words(*shape), "MismatchError", says=())
    for shape in [(32, 3), (32, 5), (16, 4)]:
        yield tensor(folder, "packed", "weight_packed", words(*shape), "MismatchError")


@case("Q04", "zeros that do not fit")
def zeros(folder: Path) -> Iterator[Variant]:
    for shape in [(1, 3), (1, 5), (2, 4), (4,), (1, 0), (1, 32)]:
        yield tensor(folder, "gptq", "qzeros", words(*shape), "MismatchError")
    yield tensor(folder, "awq", "qzeros", words(2, 4), "MismatchError")
    yield tensor(folder, "awq", "qzeros", np.zeros((1, 4), np.float32), "MismatchError")
    yield tensor(folder, "packed", "weight_zero_point", words(3, 1), "MismatchError")
    yield tensor(folder, "packed", "weight_zero_point", words(4, 2), "MismatchError")


@case("Q05", "scales that do not fit")
def scale_shapes(folder: Path) -> Iterator[Variant]:
    for value in [scales(1, 31), scales(2, 32), scales(32), words(1, 32), np.ones((1, 32))]:
        yield tensor(folder, "gptq", "scales", value, "MismatchError")
        yield tensor(folder, "awq", "scales", value, "MismatchError")
    for value in [scales(32), scales(31, 1), scales(32, 0), scales(32, 5), words(32, 1)]:
        yield tensor(folder, "packed", "weight_scale", value, "MismatchError")


@case("Q06", "scales that are NaN or infinite")
def scale_values(folder: Path) -> Iterator[Variant]:
    for bad in (np.nan, np.inf, -np.inf):
        value = scales(1, 32)
        value[0, 7] = bad
        yield tensor(folder, "gptq", "scales", value, "NumericsError")
        yield tensor(folder, "awq", "scales", value, "NumericsError")
        yield tensor(folder, "packed", "weight_scale", value.T, "NumericsError")


@case("Q07", "scales that make infinite weights")
def overflow(folder: Path) -> Iterator[Variant]:
    value = np.full((32, 1), 3e38, np.float32)
    yield tensor(folder, "packed", "weight_scale", value, "NumericsError")
    value = np.full((32, 1), 0x7F7F, np.uint16)  # in BF16: 3.4e38
    yield tensor(folder, "packed", "weight_scale", value, "NumericsError")
    yield tensor(folder, "packed", "weight_scale", np.full((32, 1), 1e5, np.float32), ACCEPTED)


@case("Q08", "groups of columns that do not exist")
def group_numbers(folder: Path) -> Iterator[Variant]:
    for at, bad in [(0, -1), (95, 3), (50, 2**31 - 1), (7, -(2**31))]:
        value = np.arange(F, dtype=np.int32) // GROUP
        value[at] = bad
        yield tensor(folder, "gptq", "g_idx", value, "MismatchError", of=DOWN, says=(str(bad), str(at)))
    value = np.full(D, -1, np.int32)
    yield tensor(folder, "packed", "weight_g_idx", value, "MismatchError")


@case("Q09", "a list of groups that does not fit")
def group_lists(folder: Path) -> Iterator[Variant]:
    for value in [np.zeros(31, np.int32), np.zeros((32, 1), np.int32), np.zeros(32, np.int64), np.zeros(32)]:
        yield tensor(folder, "gptq", "g_idx", value, "MismatchError")
        yield tensor(folder, "packed", "weight_g_idx", value, "MismatchError")
    # Columns in any order are run, also if no group is whole blocks.
    yield tensor(folder, "gptq", "g_idx", np.arange(F, dtype=np.int32)[::-1] % 3, ACCEPTED, of=DOWN)
    yield tensor(folder, "gptq", "g_idx", np.arange(F, dtype=np.int32) // 40, ACCEPTED, of=DOWN)


@case("Q10", "act-order without its groups")
def no_groups(folder: Path) -> Iterator[Variant]:
    def change(tensors: Tensors) -> None:
        del tensors[f"{Q_PROJ}.g_idx"]

    path = folder_of(folder, GPTQ | {"desc_act": True}, gptq, change)
    yield model("desc_act", path, "MismatchError", says=("g_idx",))


@case("Q11", "a tensor that is missing")
def missing(folder: Path) -> Iterator[Variant]:
    for method, part in [
        ("gptq", "qzeros"),
        ("gptq", "scales"),
        ("gptq", "qweight"),
        ("awq", "qzeros"),
        ("gemv", "scales"),
        ("packed", "weight_scale"),
        ("packed", "weight_shape"),
        ("packed", "weight_packed"),
    ]:
        yield tensor(folder, method, part, MISSING, "MismatchError")


@case("Q12", "a tensor that nothing knows")
def unknown(folder: Path) -> Iterator[Variant]:
    for method, part in [
        ("gptq", "perm"),
        ("gptq", "weight"),
        ("awq", "g_idx"),
        ("packed", "weight"),
        ("gptq", ""),
    ]:
        yield tensor(folder, method, part, np.zeros((32, 32), np.float32), "MismatchError")


@case("Q13", "biases")
def biases(folder: Path) -> Iterator[Variant]:
    yield tensor(folder, "gptq", "bias", scales(32), "UnsupportedError", says=("bias",))
    yield tensor(folder, "gptq", "bias", np.full(32, np.nan, np.float16), "UnsupportedError", says=("bias",))
    yield tensor(folder, "gptq", "bias", np.zeros(31, np.float16), "MismatchError")
    yield tensor(folder, "gptq", "bias", np.zeros(32, np.float16), ACCEPTED)
    yield tensor(folder, "awq", "bias", np.zeros(32, np.float16), "MismatchError")


@case("Q14", "a shape that is not that of its numbers")
def stated_shape(folder: Path) -> Iterator[Variant]:
    for value in [[32, -32], [32, 0], [-32, 32], [32, 2**62], [2**62, 32], [31, 32], [32, 24], [96, 32]]:
        yield tensor(folder, "packed", "weight_shape", np.array(value, np.int64), "MismatchError")
    for odd in [np.array([32.0, 32.0]), np.array([32, 32, 1], np.int64), np.array(32, np.int64)]:
        yield tensor(folder, "packed", "weight_shape", odd, "MismatchError")


@case("Q15", "padded zeros of gemv that are too few")
def gemv_width(folder: Path) -> Iterator[Variant]:
    yield tensor(folder, "gemv", "qzeros", words(32, 0), "MismatchError")
    yield tensor(folder, "gemv", "qzeros", words(32, 2), "MismatchError")
    yield tensor(folder, "gemv", "scales", scales(32, 7), "MismatchError")
    yield tensor(folder, "gemv", "qweight", words(32, 80), "MismatchError", says=())


# ---------------------------------------------------------------- settings


@case("Q16", "bits that are no number of bits")
def bits(folder: Path) -> Iterator[Variant]:
    for base, make in [(GPTQ, gptq), (AWQ, awq)]:
        for value in (0, -4, 5, 16, 10**30):
            yield setting(folder, base, make, {"bits": value}, "UnsupportedError", says=("bits",))
        for value in ("4", 4.0, True, [4], {}):
            yield setting(folder, base, make, {"bits": value}, "ConfigError", says=("bits",))
    yield setting(folder, GPTQ, gptq, {"bits": MISSING}, "ConfigError", says=("bits",))
    yield setting(folder, AWQ, awq, {"bits": None}, "UnsupportedError", says=("bits",))
    for value in (2, 3, 8):  # the tensors have 4
        yield setting(folder, GPTQ, gptq, {"bits": value}, "MismatchError", says=("4 bits", str(value)))


@case("Q17", "a group size that is no size of a group")
def group_sizes(folder: Path) -> Iterator[Variant]:
    for base, make in [(GPTQ, gptq), (AWQ, awq)]:
        for value in (0, -2, -(10**30), "32", 32.0, True, []):
            yield setting(folder, base, make, {"group_size": value}, "ConfigError", says=("group_size",))
    for value in (16, 64, 31, 10**30):
        yield setting(folder, AWQ, awq, {"group_size": value}, "MismatchError")
        path = folder_of(folder, GPTQ | {"group_size": value}, without_groups)
        yield model(f"without g_idx {value:.0e}", path, "MismatchError")


def without_groups(N: int, K: int) -> Tensors:
    return {name: x for name, x in gptq(N, K).items() if name != "g_idx"}


@case("Q18", "dynamic that is no list of overrides")
def dynamic(folder: Path) -> Iterator[Variant]:
    for value in ([], "x", 3, True):
        yield setting(folder, GPTQ, gptq, {"dynamic": value}, "ConfigError", says=("dynamic",))
    for value in ({"+:a": 3}, {"+:a": [1]}, {"+:a": "x"}):
        yield setting(folder, GPTQ, gptq, {"dynamic": value}, "FormatError")
    yield setting(folder, GPTQ, gptq, {"dynamic": {"+:a": {"bits": "4"}}}, "ConfigError")
    yield setting(folder, GPTQ, gptq, {"dynamic": {"+:a": {"bits": 7}}}, "UnsupportedError", says=("7",))
    backtracking = "+:" + "(a+)+" * 20 + "$"  # a regular expression that never ends is not run
    yield setting(folder, GPTQ, gptq, {"dynamic": {backtracking: {"bits": 8}}}, ACCEPTED)


@case("Q19", "another version than those that are run")
def versions(folder: Path) -> Iterator[Variant]:
    for value in ("marlin", "gptq_v3", "", "\x1b[31m", "x" * 10_000):
        yield setting(
            folder, GPTQ, gptq, {"checkpoint_format": value}, "UnsupportedError", says=("stored as",)
        )
        yield setting(folder, AWQ, awq, {"version": value}, "UnsupportedError", says=("stored for",))
    for value in (2, True, ["gptq"], {}):
        yield setting(folder, GPTQ, gptq, {"checkpoint_format": value}, "ConfigError")
        yield setting(folder, AWQ, awq, {"version": value}, "ConfigError")


@case("Q20", "settings of another type")
def types(folder: Path) -> Iterator[Variant]:
    for key in ("sym", "desc_act", "is_marlin_format"):
        for value in ("true", 1, [], {}):
            yield setting(folder, GPTQ, gptq, {key: value}, "ConfigError", says=(key,))
    for value in ("false", 0, []):
        yield setting(folder, AWQ, awq, {"zero_point": value}, "ConfigError", says=("zero_point",))
    yield setting(folder, AWQ, awq, {"zero_point": False}, "MismatchError", says=("zero_point",))


@case("Q21", "groups of weights that are no groups")
def config_groups(folder: Path) -> Iterator[Variant]:
    for value in (MISSING, None, [], "x", 3):
        yield setting(folder, PACKED, compressed, {"config_groups": value}, "ConfigError")
    yield setting(folder, PACKED, compressed, {"config_groups": {"a": None}}, "UnsupportedError")
    for value in ({"a": []}, {"a": "x"}):
        yield setting(folder, PACKED, compressed, {"config_groups": value}, "FormatError")
    for weights, error in [
        (None, "UnsupportedError"),
        ([], "ConfigError"),
        ({}, "ConfigError"),
        (WEIGHTS | {"num_bits": "4"}, "ConfigError"),
        (WEIGHTS | {"num_bits": 10**30}, "UnsupportedError"),
        (WEIGHTS | {"num_bits": 8}, "MismatchError"),
        (WEIGHTS | {"type": "float"}, "UnsupportedError"),
        (WEIGHTS | {"type": 3}, "ConfigError"),
    ]:
        groups = {"config_groups": {"a": {"weights": weights}}}
        yield setting(folder, PACKED, compressed, groups, error)
    yield setting(folder, PACKED, compressed, {"config_groups": {}}, "MismatchError")


@case("Q22", "a method that is no method")
def methods(folder: Path) -> Iterator[Variant]:
    for value in ("gptq", [], [GPTQ], 8, False, {"quant_method": None}, {"quant_method": [1]}):
        path = folder_of(folder, value, gptq)
        yield model(f"{path.name} {str(value)[:30]}", path, "UnsupportedError", says=("quantized by",))
    path = folder_of(folder, {}, gptq)  # an empty object means that nothing is quantized
    yield model(f"{path.name} {{}}", path, "MismatchError", says=("down_proj.weight",))
    name = "\u202e\x1b]0;x\x07" * 100
    yield setting(folder, GPTQ, gptq, {"quant_method": name}, "UnsupportedError", says=("quantized by",))
    deep: Any = 0
    for _ in range(200):
        deep = {"a": deep}
    yield setting(folder, GPTQ, gptq, {"dynamic": deep}, "UnsupportedError", "MismatchError", ACCEPTED)


@case("Q23", "settings in a file of their own")
def beside(folder: Path) -> Iterator[Variant]:
    for name, data, expected in [
        ("in order", json.dumps(GPTQ).encode(), ACCEPTED),
        ("a list", b"[]", "FormatError"),
        ("cut", json.dumps(GPTQ).encode()[:-5], "FormatError"),
        ("a duplicate key", b'{"bits": 4, "bits": 8}', "FormatError"),
        ("empty", b"", "TruncatedError"),
        ("NaN", b'{"bits": NaN}', "FormatError"),
        ("large", b'{"bits": 4, "x": "' + b"x" * (2 << 20) + b'"}', "FormatError"),
    ]:
        path = folder_of(folder, MISSING, gptq)
        (path / "quantize_config.json").write_bytes(data)
        yield model(name, path, expected)
    path = folder_of(folder, MISSING, gptq)
    yield model("missing", path, "MismatchError", says=("missing",))


@case("Q24", "weights of another size than the arguments state")
def sizes(folder: Path) -> Iterator[Variant]:
    for key, value in [("hidden_size", 64), ("intermediate_size", 128), ("num_attention_heads", 4)]:
        path = folder_of(folder, GPTQ, gptq, config={key: value, "head_dim": DH})
        yield model(key, path, "MismatchError")


@case("Q25", "a tied head that is quantized")
def tied(folder: Path) -> Iterator[Variant]:
    def change(tensors: Tensors) -> None:
        N, K = tensors.pop("lm_head.weight").shape
        N -= N % 8
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:N]
        tensors |= {f"lm_head.{part}": x for part, x in gptq(N, K).items()}

    rows = len(hf_weights()["lm_head.weight"]) // 8 * 8
    path = folder_of(folder, GPTQ, gptq, change, {"tie_word_embeddings": True, "vocab_size": rows})
    yield model("tied", path, "MismatchError", says=("tie_word_embeddings",))


@case("Q26", "quantized weights in a pickle")
def in_a_pickle(folder: Path) -> Iterator[Variant]:
    path = folder_of(folder, GPTQ, gptq)
    (path / "model.safetensors").unlink()
    from .torch import pth_bytes

    names = {f"{Q_PROJ}.{part}": np.zeros(4, np.float32) for part in gptq(32, 32)}
    (path / "pytorch_model.bin").write_bytes(pth_bytes(names))
    yield model(".bin", path, "UnsupportedError", says=(".safetensors",))


@case("Q27", "a file cut within its packed numbers")
def cut(folder: Path) -> Iterator[Variant]:
    path = folder_of(folder, GPTQ, gptq)
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-1000])
    yield model("cut", path, "TruncatedError")
    path = folder_of(folder, GPTQ, gptq)
    header = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + header])
    entries[f"{Q_PROJ}.qweight"]["shape"] = [1 << 40, 32]
    text = json.dumps(entries).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + header :])
    yield model("2^40 rows", path, "FormatError", says=("q_proj",))
