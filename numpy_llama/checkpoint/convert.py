"""Any checkpoint to one native file: a GGUF file in formats that the kernels use in place.

    f32, bf16, f16   every matrix in that format
    q8               every matrix in Q8_0
    q4               the layers in Q4_0; the embedding and the output matrix in Q8_0, because every token
                     uses one row of each
    None             every matrix in the format that it has; only for quantized weights, or a packed file

A packed file has the rows of block formats as the kernels take them (`pack_rows`), so that loading copies
nothing. Other programs refuse it. An embedding that is no output matrix too is not packed: only its rows are
used. A weight that keeps its format, and whose columns are in another order (act-order), is packed in every
file: a program that does not know the order must not read it.

What this file promises: OUT is either the old file or the whole new file, read back and compared. An error
names which of the two. A full disk, Ctrl-C, a kill or a loss of power leaves a file of another name.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import Progress
from ..backend.formats import CACHE_LINE, FORMATS, PACKED, PACKED_ROWS, Format, StoredTensor
from ..config import ModelArgs
from ..errors import MismatchError, NumericsError, ParameterError
from ..text.chat import CHAT_FORMATS
from ..text.tokenizer import UNUSED
from .base import Checkpoint, TensorInfo
from .files import sync, write_file
from .gguf.file import COLUMN_ORDER
from .gguf.model import TEMPLATE, GGUFCheckpoint
from .gguf.write import layout, write_tensor
from .names import tensor_names
from .rope_scalings import gguf_metadata, gguf_tensors

DTYPES = {"f32": "F32", "bf16": "BF16", "f16": "F16", "q8": "Q8_0", "q4": "Q4_0"}
EXPONENT = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
BYTES_AT_ONCE = 8 << 20  # of the result: progress is smooth, and memory small


def target_format(name: str, shape: tuple[int, ...], dtype: str) -> Format:
    """The format in which `convert` stores a weight. Vectors, and rows of no whole blocks, become float32."""
    wanted = "Q8_0" if dtype == "q4" and not name.startswith("layers.") else DTYPES[dtype]
    return FORMATS["F32" if len(shape) == 1 or shape[-1] % FORMATS[wanted].block else wanted]


def convert(
    source: Checkpoint,
    out: Path,
    dtype: str | None,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
    packed: bool = False,
    weights: Mapping[str, StoredTensor] | None = None,
) -> Path:
    """Write `source` to the file `out`; -> its path. progress(what, done, total) counts bytes.

    dtype: one of DTYPES, or None: weights keep their formats, if the file is packed or some weights are
    quantized. weights: others than those of the source; they too may keep their formats.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ParameterError(f"dtype is {dtype!r}, it must be one of {', '.join(DTYPES)}")
    others, out = weights, Path(os.path.realpath(out))
    weights = source.weights() if others is None else others
    if dtype is None:
        check_kept(weights, packed or others is not None)
    if out.exists():
        check_replaceable(source, out)
    source.watch()
    names = tensor_names(source.args, "gguf")
    if weights["output.weight"] is weights["tok_embeddings.weight"]:
        del names["output.weight"]
    extra = gguf_tensors(source.args)
    formats = target_formats({ours: weights[ours] for ours in names}, dtype, packed)
    plan = [(theirs, formats[ours], weights[ours].shape) for ours, theirs in names.items()]
    plan += [(name, tensor.format, tensor.shape) for name, tensor in extra.items()]
    source.tokenizer().check_rows(source.args.vocab_size)
    vocabulary = padded(source.tokenizer().metadata, source.args.vocab_size)
    metadata = model_metadata(source.args) | vocabulary | chat_metadata(source)
    metadata |= column_orders(names, weights, formats) if dtype is None else {}
    metadata |= {"general.alignment": CACHE_LINE} if any(f.rows > 1 for f in formats.values()) else {}
    head, infos = layout(plan, metadata)
    total = infos[-1].offset + infos[-1].nbytes
    tensors = [weights[ours] for ours in names] + list(extra.values())

    def write(part: Path) -> None:
        with part.open("xb") as file:
            file.write(head)
            done, sums = 0, []
            for info, tensor, (_, format, _) in zip(infos, tensors, plan, strict=True):
                digest = hashlib.blake2b()
                where = f"{source.path}: {info.name}"
                keep = dtype is None and (tensor.column_order is None or format.rows > 1)
                pieces = converted(where, tensor, format, threads, keep)
                for piece in write_tensor(file, info, pieces):
                    digest.update(piece.data)
                    progress("converting", done := done + piece.nbytes, total)
                sums.append(digest.digest())
                source.check_unchanged()
            sync(file)
        verify(GGUFCheckpoint(part), source.args, infos, sums, progress)

    write_file(out, total, write)
    return out


def target_formats(weights: Mapping[str, StoredTensor], dtype: str | None, packed: bool) -> dict[str, Format]:
    """The format of each weight in the new file. ParameterError if no weight of a packed file is packed."""
    formats = {name: target_format(name, w.shape, dtype or "f32") for name, w in weights.items()}
    if dtype is None:
        formats |= {name: w.format for name, w in weights.items() if len(w.shape) > 1}
    if not packed:
        sorted_by = (
            {name for name, w in weights.items() if w.column_order is not None} if dtype is None else ()
        )
        return formats | {name: formats[name].packed for name in sorted_by if formats[name].block > 1}
    multiplied = [
        name for name in weights if name != "tok_embeddings.weight" or "output.weight" not in weights
    ]
    to_pack = {name: formats[name].packed for name in multiplied if formats[name].block > 1}
    if not to_pack:
        found = ", ".join(dict.fromkeys(format.name for format in formats.values()))
        raise ParameterError(f"nothing to pack: {found} weights are used as they are; choose dtype q8 or q4")
    expanded = [name for name, w in weights.items() if not w.in_place and w.format.block == 1]
    if dtype is None and expanded:
        what = "the kernels do not take its format, so it cannot be kept"
        raise ParameterError(f"{expanded[0]}: {what}; choose dtype q8 or q4")
    return formats | to_pack


def check_kept(weights: Mapping[str, StoredTensor], may_be_plain: bool) -> None:
    """ParameterError unless weights can keep their formats, and some are quantized or `may_be_plain`."""
    if not may_be_plain and all(w.format.block == 1 for w in weights.values()):
        raise ParameterError(f"--dtype is missing, it must be one of {', '.join(DTYPES)}")


def column_orders(
    names: Mapping[str, str], weights: Mapping[str, StoredTensor], formats: Mapping[str, Format]
) -> dict[str, Any]:
    """The keys of the weights whose columns stay in another order: see gguf/file.py."""
    return {
        f"{COLUMN_ORDER}{theirs}": order.astype(np.uint32)
        for ours, theirs in names.items()
        if (order := weights[ours].column_order) is not None and formats[ours].rows > 1
    }


def check_replaceable(source: Checkpoint, out: Path) -> None:
    """ParameterError unless `out` is a file that does not belong to the source."""
    if out.is_dir():
        raise ParameterError(f"{out} is a folder; wanted the name of a file")
    if not out.is_file():
        raise ParameterError(f"{out} is no regular file; wanted the name of one")
    used = [*(file.path for file in source.files), *source.beside()]
    # One file has several names, such as MODEL.gguf where the file system takes it for model.gguf.
    if any(os.path.exists(path) and os.path.samefile(path, out) for path in used):
        raise ParameterError(f"{out} is part of what is to be converted: give another name for the result")


def converted(
    where: str, tensor: StoredTensor, to: Format, threads: int | None, keep: bool = False
) -> Iterator[np.ndarray]:
    """The bytes of a weight in another format, some rows at a time, in the model's order.

    keep: the weight has that format already, and its bytes are copied. NumericsError, with `where` in its
    message, if a weight is NaN or too large for the format `to`.
    """
    format = PACKED.get(to.name, to)
    if len(tensor.shape) == 1:
        yield finite(where, StoredTensor.quantize(tensor.dequantize(), format).data, format.name)
        return
    if not keep or to is not format:
        from ..backend.kernels import Kernels, pack  # only here: bytes are copied without the C extension

        kernels = Kernels(threads)
    tensor = tensor.realize()
    rows = max(1, BYTES_AT_ONCE // to.nbytes((PACKED_ROWS, tensor.shape[-1]))) * PACKED_ROWS
    for begin in range(0, len(tensor), rows):
        end = min(begin + rows, len(tensor))
        try:
            if keep:
                piece = tensor.stored_rows(slice(begin, end))
            else:
                piece = kernels.convert(tensor, format, begin, end)
        except ParameterError as error:
            raise NumericsError(f"{where}: {error}") from None
        piece = finite(where, piece, format.name)
        yield piece if to is format else pack(piece, format, kernels.threads)


def finite(where: str, data: np.ndarray, to: str) -> np.ndarray:
    """`data`; NumericsError if a number in it is NaN or infinite: all bits of its exponent are then set."""
    if to in EXPONENT:
        type, exponent = EXPONENT[to]
        if ((data.view(type) & exponent) == exponent).any():
            raise NumericsError(f"{where}: a weight is NaN, or infinite, or too large for {to}")
    return data


def verify(
    written: GGUFCheckpoint, args: ModelArgs, infos: list[TensorInfo], sums: list[bytes], progress: Progress
) -> None:
    """Read a new file back; MismatchError unless header and tensors are those that were written."""
    found = written.args
    if found != args or list(written.tensors.values()) != infos:
        raise MismatchError(f"{written.path} was written wrongly: it has {found}, wanted {args}")
    total = sum(info.nbytes for info in infos)
    done = 0
    for info, wanted in zip(infos, sums, strict=True):
        data = written.file.file.bytes_at(info.offset, info.nbytes, info.name)
        digest = hashlib.blake2b()
        for begin in range(0, info.nbytes, BYTES_AT_ONCE):
            digest.update(data[begin : begin + BYTES_AT_ONCE].data)
            progress("checking", min(done + begin + BYTES_AT_ONCE, total), total)
        if digest.digest() != wanted:
            raise MismatchError(f"{written.path} was written wrongly: {info.name} reads back differently")
        done += info.nbytes
        written.file.file.forget(info.offset, info.nbytes)
    written.weights()
    written.tokenizer()


def model_metadata(args: ModelArgs) -> dict[str, Any]:
    """The keys that gguf.model.model_args reads."""
    return {
        "general.architecture": "llama",
        "llama.block_count": args.n_layers,
        "llama.context_length": args.max_seq_len,
        "llama.embedding_length": args.dim,
        "llama.feed_forward_length": args.hidden_dim,
        "llama.attention.head_count": args.n_heads,
        "llama.attention.head_count_kv": args.n_kv_heads,
        "llama.attention.key_length": args.head_dim,
        "llama.attention.value_length": args.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(args.norm_eps),
        "llama.rope.freq_base": float(args.rope_theta),
        "llama.rope.dimension_count": args.head_dim,
        "llama.vocab_size": args.vocab_size,
        **({} if (window := args.sliding_window) is None else {"llama.attention.sliding_window": window}),
    } | gguf_metadata(args.rope_scaling)


def padded(vocabulary: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The vocabulary with a token for every row of the embedding, as GGUF requires.

    Some models have rows without a token. Those rows get tokens named [PAD0] and so on.
    """
    out = dict(vocabulary)
    n = len(out["tokenizer.ggml.tokens"])
    if missing := rows - n:
        out["tokenizer.ggml.tokens"] = [*out["tokenizer.ggml.tokens"], *(f"[PAD{i}]" for i in range(n, rows))]
        for key, value in (("token_type", UNUSED), ("scores", 0)):
            if (column := out.get(f"tokenizer.ggml.{key}")) is not None:
                out[f"tokenizer.ggml.{key}"] = np.append(column, np.full(missing, value, column.dtype))
    return out


def chat_metadata(source: Checkpoint) -> dict[str, Any]:
    """The model's template, or the name of its format in chat.py."""
    if (template := source.chat_template()) is not None:
        tool_use = source.chat_template("tool_use")
        return {TEMPLATE: template} | ({} if tool_use is None else {f"{TEMPLATE}.tool_use": tool_use})
    known = next((name for name, f in CHAT_FORMATS.items() if f is source.chat_format()), None)
    return {} if known is None else {"numpy_llama.chat_format": known}
