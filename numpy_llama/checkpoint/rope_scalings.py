"""RoPE scalings of Hugging Face's config.json and of GGUF: both are read here, and GGUF's written.

Numbers that both formats use as float32 are rounded to float32, so that conversion keeps them equal.
"""

from typing import Any

import numpy as np

from ..backend.formats import StoredTensor
from ..config import LIMITS, ModelArgs, RopeScaling
from ..errors import ConfigError, MismatchError, UnsupportedError, escape
from ..functional import rope_freqs
from ..rope import (
    DynamicScaling,
    ExplicitScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
    longrope_length,
    yarn_length,
)
from .gguf.file import GGUFFile
from .json_file import JsonFile
from .names import PHI3

HF_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su")  # "su" is the older longrope
HF_NOT_RUN = ("mrope", "proportional", "axial")
# Every key that is read. Other keys could change the angles: an error names them.
HF_KEYS = {
    *("rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "attention_factor"),
    *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    *("truncate", "short_factor", "long_factor", "partial_rotary_factor", "finetuned"),
}
GGUF_KINDS = ("none", "linear", "yarn", "longrope")
# Values that mean the same in all versions of llama.cpp, which differ in any others.
GGUF_PLAIN = {
    "alpha": 0.0,
    "yarn_ext_factor": 1.0,
    "yarn_attn_factor": 1.0,
    "yarn_log_multiplier": 0.0,
}
DIVISORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (DIVISORS, LONG, SHORT)
LLAMA3_TOLERANCE = 1e-5  # relative: the divisors were computed and stored in float32


def hf_rope(config: JsonFile) -> tuple[float, RopeScaling | None]:
    """rope_theta, and the scaling.

    transformers 5 writes both into `rope_parameters`; earlier versions write rope_theta and `rope_scaling`.
    """
    given = [part for key in ("rope_parameters", "rope_scaling") if (part := config.part(key)) is not None]
    if len(given) == 2 and given[0].values != given[1].values:
        raise ConfigError(f"{config.path}: rope_parameters and rope_scaling differ")
    rope = given[0] if given else JsonFile(config.path, values={})
    if odd := sorted(key for key in rope.values.keys() - HF_KEYS if rope.values[key] is not None):
        raise UnsupportedError(
            f"{config.path}: the RoPE scaling has {escape(odd[0], 60)}, which is not known"
        )
    if (part := rope.get("partial_rotary_factor", float, 1.0)) != 1:
        raise UnsupportedError(f"{config.path}: partial_rotary_factor is {part}; only 1 is run here")
    thetas = [config.get("rope_theta", float), rope.get("rope_theta", float)]
    theta = _agreed(config, "rope_theta", thetas, 10000.0)
    kinds = [rope.get("rope_type", str), rope.get("type", str)]
    kind = _agreed(config, "rope_type", kinds, None if "factor" in rope.values else "default")
    if kind in HF_NOT_RUN:
        known = ", ".join(HF_KINDS)
        raise UnsupportedError(f"{config.path}: RoPE scaling {escape(kind)} cannot be run; known are {known}")
    if kind not in HF_KINDS:
        raise ConfigError(
            f"{config.path}: rope_type is {escape(kind)}, it must be one of {', '.join(HF_KINDS)}"
        )
    if kind == "default":
        return theta, None
    if kind == "yarn" and config.get("model_type", str) == PHI3:  # whose "yarn" is a LongRoPE
        kind = "longrope"
    made, values = _hf_values(config, rope, kind)
    try:
        return theta, made(*values)
    except ConfigError as error:
        raise ConfigError(f"{config.path}: the RoPE scaling: {error}") from None


def _hf_values(config: JsonFile, rope: JsonFile, kind: str) -> tuple[type[RopeScaling], tuple[Any, ...]]:
    """The class of the scaling, and the arguments of its constructor."""
    context, key = config.get("max_position_embeddings", int, 2048), "original_max_position_embeddings"
    original = _agreed(config, key, [config.get(key, int), rope.get(key, int)], None)
    factor, length = rope.get("factor", float), rope.get("attention_factor", float)
    if kind not in ("longrope", "su"):
        rope.require("factor", float)
    if kind == "linear":
        return LinearScaling, (factor,)
    if kind == "dynamic":
        original = _agreed(config, key, [context, original], None)
        return DynamicScaling, (factor, min(original, LIMITS["max_seq_len"]))
    if original is None:
        raise ConfigError(f"{config.path} has no {key}")
    if kind == "llama3":
        ramp = rope.require("low_freq_factor", float), rope.require("high_freq_factor", float)
        return Llama3Scaling, (factor, *ramp, original)
    if kind == "yarn":
        length = as_float32(_yarn_length(rope, factor) if length is None else length)
        betas = rope.get("beta_fast", float) or 32.0, rope.get("beta_slow", float) or 1.0
        return YarnScaling, (factor, original, length, *betas, rope.get("truncate", bool, True))
    if original < 2:
        raise ConfigError(f"{config.path}: {key} is {original}, with LongRoPE it must be 2 or more")
    if length is None:
        length = longrope_length(context / original if factor is None else factor, original)
    lists = _numbers(rope, "short_factor"), _numbers(rope, "long_factor")
    return LongRopeScaling, (*lists, original, as_float32(length))


def _yarn_length(rope: JsonFile, factor: float) -> float:
    """YaRN's length factor without attention_factor. mscale and mscale_all_dim count only together."""
    mscale, all_dim = (rope.get(key, float, 0.0) for key in ("mscale", "mscale_all_dim"))
    if mscale < 0 or all_dim < 0:
        raise ConfigError(
            f"{rope.path}: mscale is {mscale} and mscale_all_dim {all_dim}, neither may be below 0"
        )
    if not (mscale and all_dim):
        return yarn_length(factor)
    return yarn_length(factor, mscale) / yarn_length(factor, all_dim)


def _numbers(rope: JsonFile, key: str) -> tuple[float, ...]:
    listed = rope.require(key, list)
    for i, x in enumerate(listed):
        if type(x) not in (int, float) or not abs(x) < 1e38:
            raise ConfigError(
                f"{rope.path}: {key}[{i}] is {escape(x, 60)}, wanted a number from 1e-30 to 1e38"
            )
    return tuple(np.array(listed, np.float32).tolist())


def _agreed(config: JsonFile, key: str, values: list[Any], default: Any) -> Any:
    """The value of a key that has several places; ConfigError if two places differ."""
    given = [value for value in values if value is not None]
    if given and given.count(given[0]) < len(given):
        raise ConfigError(
            f"{config.path}: {key} is given as {escape(given[0], 60)} and {escape(given[1], 60)}"
        )
    return given[0] if given else default


def gguf_scaling(file: GGUFFile, args: ModelArgs) -> RopeScaling | None:
    """The scaling by llama.cpp's keys, or by tensors of divisors. `args` has no scaling yet."""
    scaling_keys = f"{file.metadata['general.architecture']}.rope.scaling."
    for key, plain in ((scaling_keys + key, plain) for key, plain in GGUF_PLAIN.items()):
        if file.metadata.get(key, plain) != plain:
            raise UnsupportedError(f"{file.path}: {key} is {escape(file.metadata[key], 60)}, not {plain}")
    if (found := _gguf_values(file, args)) is None:
        return None
    made, values = found
    try:
        scaling = made(*values)
        scaling.check(args)
        if isinstance(scaling, ExplicitScaling) and scaling.length_factor == 1:
            return _recognized(file, args, scaling)
    except ConfigError as error:
        raise ConfigError(f"{file.path}: the RoPE scaling: {error}") from None
    return scaling


def _gguf_values(file: GGUFFile, args: ModelArgs) -> tuple[type[RopeScaling], tuple[Any, ...]] | None:
    """The class of the scaling, and the arguments of its constructor; None without a scaling."""
    rope, ours = f"{file.metadata['general.architecture']}.rope.", "numpy_llama.rope."
    key = f"{rope}scaling."
    tensors = {name: _divisors(file, name, args) for name in TENSORS if name in file.tensors}
    kind = file.get(f"{key}type", str, "longrope" if LONG in tensors else "linear")
    factor = file.decimal(f"{key}factor", file.decimal(f"{rope}scale_linear", 1.0))
    original = file.get(f"{key}original_context_length", int, args.max_seq_len)
    length, dynamic = file.decimal(f"{key}attn_factor", 1.0), file.decimal(f"{ours}dynamic_factor", 0.0)
    if kind not in GGUF_KINDS:
        known = ", ".join(GGUF_KINDS)
        raise UnsupportedError(f"{file.path}: RoPE scaling {escape(kind)} by {factor}; known are {known}")
    scaled = kind != "none" and factor != 1
    wanted = (
        {LONG, SHORT} if kind == "longrope" else set() if scaled or dynamic else tensors.keys() & {DIVISORS}
    )
    if tensors.keys() != wanted or (kind == "longrope" and (scaled or dynamic)):
        what = f"{escape(kind)} by {factor} together with {', '.join(sorted(tensors)) or 'no tensor'}"
        wants = f"longrope wants {LONG} and {SHORT} and no factor, linear and yarn want no tensor"
        raise UnsupportedError(f"{file.path}: RoPE scaling {what} cannot be run: {wants}")
    if kind == "longrope":
        return LongRopeScaling, (tensors[SHORT], tensors[LONG], original, length)
    if dynamic:
        return DynamicScaling, (dynamic, file.get(f"{ours}original_max_seq_len", int, args.max_seq_len))
    if kind == "yarn" and scaled:
        if not factor > 0:
            raise ConfigError(f"{file.path}: {key}factor is {factor}, it must be above 0")
        length = file.decimal(f"{ours}length_factor", as_float32(length * yarn_length(factor)))
        betas = file.decimal(f"{key}yarn_beta_fast", 32.0), file.decimal(f"{key}yarn_beta_slow", 1.0)
        return YarnScaling, (factor, original, length, *betas, file.get(f"{ours}truncate", bool, True))
    if length == 1 and not tensors:
        return (LinearScaling, (factor,)) if scaled else None
    same = np.full(args.head_dim // 2, factor if scaled else 1.0, np.float32)
    divisors = tensors.get(DIVISORS) or tuple(same.tolist())
    return None if length == 1 and set(divisors) == {1.0} else (ExplicitScaling, (divisors, length))


def _divisors(file: GGUFFile, name: str, args: ModelArgs) -> tuple[float, ...]:
    stored = file.tensor(name)
    if stored.shape != (args.head_dim // 2,):
        raise MismatchError(f"{file.path}: {name} is {stored.shape}, head_dim is {args.head_dim}")
    return tuple(stored.dequantize().tolist())


def _recognized(file: GGUFFile, args: ModelArgs, explicit: ExplicitScaling) -> RopeScaling:
    """Llama3Scaling if the divisors are those of Llama 3.1: the arguments then equal the published ones.

    GGUF has no keys for the ends of the ramp: they are numpy_llama's. All of Meta's models have the defaults.
    """
    ours, usual = "numpy_llama.rope.", Llama3Scaling(max(explicit.factors))
    llama3 = Llama3Scaling(
        usual.factor,
        file.decimal(f"{ours}low_freq_factor", usual.low_freq_factor),
        file.decimal(f"{ours}high_freq_factor", usual.high_freq_factor),
        file.get(f"{ours}original_max_seq_len", int, usual.original_max_seq_len),
    )
    wanted = llama3.divisors(rope_freqs(args.head_dim, args.rope_theta), args.rope_theta, args.max_seq_len)
    return llama3 if np.allclose(explicit.factors, wanted, rtol=LLAMA3_TOLERANCE, atol=0) else explicit


def gguf_metadata(scaling: RopeScaling | None) -> dict[str, Any]:
    """The keys that `gguf_scaling` reads: llama.cpp's if there is one, else numpy_llama's."""
    key, ours = "llama.rope.scaling.", "numpy_llama.rope."
    if isinstance(scaling, LinearScaling):
        return {f"{key}type": "linear", f"{key}factor": float(scaling.factor)}
    if isinstance(scaling, DynamicScaling):
        return {
            f"{ours}dynamic_factor": float(scaling.factor),
            f"{ours}original_max_seq_len": scaling.original_max_seq_len,
        }
    if isinstance(scaling, Llama3Scaling):
        return {
            f"{ours}low_freq_factor": float(scaling.low_freq_factor),
            f"{ours}high_freq_factor": float(scaling.high_freq_factor),
            f"{ours}original_max_seq_len": scaling.original_max_seq_len,
        }
    if isinstance(scaling, YarnScaling):
        return {
            f"{key}type": "yarn",
            f"{key}factor": float(scaling.factor),
            f"{key}original_context_length": scaling.original_max_seq_len,
            f"{key}attn_factor": as_float32(scaling.length_factor / yarn_length(scaling.factor)),
            f"{key}yarn_beta_fast": float(scaling.beta_fast),
            f"{key}yarn_beta_slow": float(scaling.beta_slow),
            f"{ours}length_factor": float(scaling.length_factor),  # in llama.cpp a product of two
            f"{ours}truncate": scaling.truncate,
        }
    if isinstance(scaling, LongRopeScaling):
        return {
            f"{key}type": "longrope",
            f"{key}original_context_length": scaling.original_max_seq_len,
            f"{key}attn_factor": float(scaling.length_factor),
        }
    return {} if scaling is None else {f"{key}attn_factor": float(scaling.length_factor)}


def gguf_tensors(args: ModelArgs) -> dict[str, StoredTensor]:
    """The divisors that GGUF stores as tensors."""
    scaling, lists = args.rope_scaling, dict[str, Any]()
    if isinstance(scaling, Llama3Scaling | ExplicitScaling):
        freqs = rope_freqs(args.head_dim, args.rope_theta)
        lists = {DIVISORS: scaling.divisors(freqs, args.rope_theta, args.max_seq_len)}
    if isinstance(scaling, LongRopeScaling):
        lists = {LONG: scaling.long_factor, SHORT: scaling.short_factor}
    return {name: StoredTensor.quantize(np.asarray(x, np.float32), "F32") for name, x in lists.items()}


def as_float32(x: float) -> float:
    """The nearest float32, as the float of its shortest decimal form."""
    return float(str(np.float32(x)))
