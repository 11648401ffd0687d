"""B: folders of bitsandbytes, FP8 and compressed-tensors. One tensor or one setting of each is wrong."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .case import ACCEPTED, Variant, case, model
from .models import CONFIG, hf_folder, hf_weights
from .safetensors import with_header

DOWN = "model.layers.0.mlp.down_proj"  # (32, 96), the weight that is spoiled
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]  # dtype, shape, data
NF4 = np.float32(
    [-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1]
)  # fmt: skip
FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
W8A8 = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": GROUP}}


def f32(values) -> tuple[str, tuple[int, ...], bytes]:
    array = np.asarray(values, "<f4")
    return "F32", array.shape, array.tobytes()


def u8(data: bytes, *shape: int) -> tuple[str, tuple[int, ...], bytes]:
    return "U8", shape or (len(data),), data


def state(**changes) -> tuple[str, tuple[int, ...], bytes]:
    plain = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [32, 96]}
    nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}
    found = plain | (nested if any(key in nested for key in changes) else {}) | changes
    return u8(json.dumps(found).encode())


def of_four_bits(N: int, K: int) -> Tensors:
    n = N * K
    return {
        "weight": u8((bytes(range(256)) * n)[: n // 2], n // 2, 1),
        "weight.absmax": f32(np.full(n // 64, 0.05)),
        "weight.quant_map": f32(NF4),
        "weight.quant_state.bitsandbytes__nf4": state(shape=[N, K]),
    }


def double(N: int, K: int) -> Tensors:
    blocks = N * K // 64
    return of_four_bits(N, K) | {
        "weight.absmax": u8(bytes(range(blocks))),
        "weight.nested_absmax": f32([0.1]),
        "weight.nested_quant_map": f32(np.linspace(-1, 1, 256)),
        "weight.quant_state.bitsandbytes__nf4": state(shape=[N, K], nested_offset=0.1),
    }


def of_eight_bits(N: int, K: int) -> Tensors:
    return {"weight": ("I8", (N, K), (bytes(range(256)) * N * K)[: N * K]), "SCB": f32(np.full(N, 0.2))}


def of_fp8(N: int, K: int) -> Tensors:
    codes = (bytes(range(0x7F)) * N * K)[: N * K]
    return {"weight": ("F8_E4M3", (N, K), codes), "weight_scale_inv": f32([[1e-3]])}


def of_w8a8(N: int, K: int) -> Tensors:
    return {"weight": of_eight_bits(N, K)["weight"], "weight_scale": f32(np.full((N, 1), 1e-3))}


def folder_of(
    path: Path, make: Callable[[int, int], Tensors], settings: dict, changes: dict[str, object]
) -> Path:
    """Every matrix in the layer is quantized. changes: a part of DOWN -> another tensor, or None for none."""
    tensors: Tensors = {}
    for name, w in hf_weights().items():
        if w.ndim == 1 or "layers" not in name:
            tensors[name] = f32(w)
        else:
            parts = make(*w.shape)
            stem = name.removesuffix("weight")
            tensors |= {stem + part: value for part, value in parts.items()}
    for part, value in changes.items():
        tensors.pop(f"{DOWN}.{part}", None)
        if value is not None:
            tensors[f"{DOWN}.{part}"] = value
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    text = with_header(json.dumps(header).encode(), data)
    return hf_folder(path, {**CONFIG, "quantization_config": settings}, text)


KINDS = {
    "4 bits": (of_four_bits, FOUR), "double": (double, FOUR), "8 bits": (of_eight_bits, EIGHT),
    "FP8": (of_fp8, FP8), "W8A8": (of_w8a8, W8A8),
}  # fmt: skip


def in_order_of(path: Path, kind: str) -> Path:
    make, settings = KINDS[kind]
    return folder_of(path, make, settings, {})


@case("OK7", "folders of bitsandbytes, FP8 and W8A8 in order")
def in_order(folder: Path) -> Iterator[Variant]:
    for name in KINDS:
        yield model(name, in_order_of(folder / name, name), ACCEPTED)


def spoiled(id: str, title: str, kind: str, changes: dict[str, dict], *expected: str, **settings) -> None:
    """A case whose variants change one tensor each, or the settings."""
    make, plain = KINDS[kind]

    @case(id, title)
    def build(folder: Path) -> Iterator[Variant]:
        for name, parts in changes.items():
            path = folder_of(folder / name, make, plain | settings, parts)
            yield model(name, path, *expected)


STATE = "weight.quant_state.bitsandbytes__nf4"
N, K = 32, 96
HUGE = 1 << 40


def states(**changes: dict) -> dict[str, dict]:
    return {name: {STATE: state(**values)} for name, values in changes.items()}


spoiled(
    "B01",
    "4 bits: the bytes do not fit the shape",
    "4 bits",
    {
        "one too few": {"weight": u8(bytes(1535))},
        "none": {"weight": u8(b"", 0, 1)},
        "twice as many": {"weight": u8(bytes(3072), 1536, 2)},
    },
    "MismatchError",
)
spoiled(
    "B02",
    "4 bits: shapes that are none",
    "4 bits",
    states(
        negative={"shape": [-32, -96]},
        text={"shape": "32"},
        one={"shape": [3072]},
        zero={"shape": [0, 96]},
        float={"shape": [32.0, 96]},
        true={"shape": [True, 3072]},
        nothing={"shape": None},
    ),
    "FormatError",
)
spoiled(
    "B03",
    "4 bits: a shape beyond all memory",
    "4 bits",
    states(huge={"shape": [(1 << 32) - 1, (1 << 32) - 1]}, wide={"shape": [1, 1 << 31]}),
    "MismatchError",
)
spoiled("B04", "4 bits: a shape that overflows", "4 bits", states(a={"shape": [HUGE, HUGE]}), "FormatError")
spoiled(
    "B05",
    "4 bits: blocks of no size",
    "4 bits",
    states(
        zero={"blocksize": 0},
        negative={"blocksize": -64},
        odd={"blocksize": 63},
        huge={"blocksize": HUGE},
        text={"blocksize": "64"},
        float={"blocksize": 64.5},
        nothing={"blocksize": None},
    ),
    "FormatError",
)
spoiled(
    "B06",
    "4 bits: too few or too many scales",
    "4 bits",
    {
        "none": {"weight.absmax": f32([])},
        "one": {"weight.absmax": f32([1])},
        "one too many": {"weight.absmax": f32(np.ones(49))},
        "a matrix": {"weight.absmax": f32(np.ones((48, 1)))},
        "bytes": {"weight.absmax": u8(bytes(48))},
    },
    "MismatchError",
)
spoiled(
    "B07",
    "4 bits: scales that are not finite",
    "4 bits",
    {
        name: {"weight.absmax": f32([1] * 47 + [value])}
        for name, value in {"NaN": np.nan, "infinite": np.inf, "negative": -np.inf}.items()
    },
    "NumericsError",
)
spoiled(
    "B08",
    "4 bits: another table",
    "4 bits",
    {
        "zeros": {"weight.quant_map": f32(np.zeros(16))},
        "NaN": {"weight.quant_map": f32([np.nan] * 16)},
        "reversed": {"weight.quant_map": f32(NF4[::-1])},
    },
    "UnsupportedError",
)
spoiled(
    "B09",
    "4 bits: a table of another size",
    "4 bits",
    {
        "15": {"weight.quant_map": f32(NF4[1:])},
        "none": {"weight.quant_map": None},
        "bytes": {"weight.quant_map": u8(NF4.tobytes())},
    },
    "MismatchError",
)
spoiled(
    "B10",
    "a state that is no JSON",
    "4 bits",
    {
        "empty": {STATE: u8(b"", 0)},
        "text": {STATE: u8(b"nf4")},
        "NaN": {STATE: u8(b'{"blocksize":NaN}')},
        "not UTF-8": {STATE: u8(b"\xff\xfe")},
        "deep": {STATE: u8(b"[" * 4000)},
        "duplicate": {STATE: u8(b'{"shape":[1,1],"shape":[2,2]}')},
        "list": {STATE: u8(b"[]")},
        "digits": {STATE: u8(b"9" * 4000)},
    },
    "FormatError",
)
spoiled(
    "B11",
    "a state that is no text",
    "4 bits",
    {
        "float32": {STATE: f32([1, 2])},
        "a matrix": {STATE: u8(b"{}", 2, 1)},
        "1 MB": {STATE: u8(b" " * (1 << 20))},
    },
    "MismatchError",
)
spoiled(
    "B12",
    "a state with other keys",
    "4 bits",
    {
        "none": {STATE: u8(b"{}")},
        "one more": {STATE: state(code="import os")},
        "escape codes": {STATE: u8(json.dumps({"\x1b[2J": 1}).encode())},
    },
    "FormatError",
)
spoiled("B13", "a state of another type", "4 bits", states(fp4={"quant_type": "fp4"}), "MismatchError")
spoiled(
    "B14",
    "no state, or two",
    "4 bits",
    {"none": {STATE: None}, "two": {"weight.quant_state.bitsandbytes__fp4": state()}},
    "MismatchError",
)
spoiled(
    "B15",
    "double quantization: an offset that is no float32",
    "double",
    states(
        huge={"nested_offset": 1e39},
        digits={"nested_offset": 10**400},
        text={"nested_offset": "0"},
        nothing={"nested_offset": None},
        infinite={"nested_offset": float("inf")},
    ),
    "FormatError",
)
spoiled(
    "B16",
    "double quantization: blocks of no size",
    "double",
    states(
        zero={"nested_blocksize": 0},
        negative={"nested_blocksize": -1},
        huge={"nested_blocksize": HUGE},
        float={"nested_blocksize": 256.0},
    ),
    "FormatError",
)
spoiled(
    "B17",
    "double quantization: nested scales do not fit",
    "double",
    {
        "two": {"weight.nested_absmax": f32([1, 2])},
        "none": {"weight.nested_absmax": None},
        "short table": {"weight.nested_quant_map": f32(np.ones(255))},
        "no table": {"weight.nested_quant_map": None},
        "float scales": {"weight.absmax": f32(np.ones(48))},
    },
    "MismatchError",
)
spoiled(
    "B18",
    "double quantization: scales that overflow",
    "double",
    {
        "NaN": {"weight.nested_absmax": f32([np.nan])},
        "infinite": {"weight.nested_absmax": f32([np.inf])},
        "table": {"weight.nested_quant_map": f32([np.nan] * 256)},
        "sum": {
            "weight.nested_absmax": f32([3.4e38]),
            "weight.nested_quant_map": f32([1] * 256),
            STATE: state(nested_offset=3.4e38),
        },
    },
    "NumericsError",
)
spoiled(
    "B19",
    "8 bits: scales do not fit",
    "8 bits",
    {
        "31": {"SCB": f32(np.ones(31))},
        "one": {"SCB": f32(1)},
        "bytes": {"SCB": u8(bytes(32))},
        "unsigned": {"weight": u8(bytes(N * K), N, K)},
        "no weight": {"weight": None},
        "another tensor": {"zero_point": f32([0])},
    },
    "MismatchError",
)
spoiled(
    "B20",
    "8 bits: scales that overflow",
    "8 bits",
    {
        "NaN": {"SCB": f32([np.nan] * 32)},
        "infinite": {"SCB": f32([-np.inf] * 32)},
        "huge": {"SCB": f32([3e38] * 32)},
    },
    "NumericsError",
)
spoiled(
    "B21",
    "8 bits: in the order of a GPU",
    "8 bits",
    {"2": {"weight_format": ("U8", (), b"\x02")}},
    "UnsupportedError",
)
spoiled(
    "B22",
    "FP8: the grid of scales does not fit",
    "FP8",
    {
        "two": {"weight_scale_inv": f32([[1, 1]])},
        "32 x 96": {"weight_scale_inv": f32(np.ones((32, 96)))},
        "powers of two": {"weight_scale_inv": ("F8_E8M0", (1, 1), b"\x7f")},
        "E5M2": {"weight": ("F8_E5M2", (N, K), bytes(N * K))},
        "both": {"weight_scale": f32(1)},
    },
    "MismatchError",
)
spoiled(
    "B23",
    "FP8: weights or scales that are not finite",
    "FP8",
    {
        "NaN": {"weight": ("F8_E4M3", (N, K), b"\x7f" * (N * K))},
        "-NaN": {"weight": ("F8_E4M3", (N, K), b"\xff" * (N * K))},
        "scale": {"weight_scale_inv": f32([[np.inf]])},
        "huge": {"weight_scale_inv": f32([[1e36]])},
    },
    "NumericsError",
)
spoiled("B24", "FP8: blocks of no size", "FP8", {"0": {}}, "ConfigError", weight_block_size=[0, HUGE])
spoiled(
    "B25",
    "W8A8: a zero point",
    "W8A8",
    {"bytes": {"weight_zero_point": u8(bytes(32), 32, 1)}},
    "UnsupportedError",
)
spoiled(
    "B26",
    "W8A8: scales do not fit",
    "W8A8",
    {
        "groups": {"weight_scale": f32(np.ones((32, 3)))},
        "whole numbers": {"weight_scale": ("I32", (32, 1), bytes(128))},
    },
    "MismatchError",
)
