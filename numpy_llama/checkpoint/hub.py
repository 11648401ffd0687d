"""Models of the Hugging Face Hub: hf:OWNER/REPO[@REVISION][:QUANTIZATION or FILE].

What this file promises: only the files that the model needs are fetched, and none of them is run. A file
gets its name only when its size and its checksum are those that the Hub announces. What was fetched before a
cut or Ctrl-C is kept, and the next fetch continues it. huggingface_hub, an extra, has the addresses, the
token and the connection. The files lie in its cache, in its published layout, where other programs find them:

    models--OWNER--REPO/blobs/CHECKSUM         the bytes; CHECKSUM.incomplete until they are whole
    models--OWNER--REPO/refs/REVISION          the commit that was the revision when the Hub was last asked
    models--OWNER--REPO/snapshots/COMMIT/NAME  a link to the bytes
    .locks/models--OWNER--REPO/CHECKSUM.lock   held by the program that fetches these bytes
"""

import errno
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple
from urllib.parse import urlsplit

from ..backend import Progress
from ..errors import DownloadError, ParameterError, ResourceLimitError, UnsupportedError, escape
from . import quantized
from .files import sync
from .huggingface import SHARD, TEMPLATES, WEIGHTS, model_args
from .json_file import MAX_BYTES, JsonFile
from .other_models import other_architecture, other_folder

_log = logging.getLogger(__name__)  # remarks; the command line prints them as its notes

PREFIX = "hf:"
FORM = "hf:OWNER/REPO, perhaps with :Q4_K_M, :FILE.gguf or @REVISION behind it"
_WORD = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
_NAME = re.compile(
    rf"hf:(?P<repo>{_WORD}/{_WORD})(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[\w.+/-]+))?", re.ASCII
)
# The files beside the weights of a Hugging Face folder that a reader here opens.
TOKENIZER = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
BESIDE = (*TOKENIZER, *quantized.BESIDE, *TEMPLATES)
MAX_BESIDE = 32 << 20  # bytes of each: the largest is a tokenizer.json
META = re.compile(r"params\.json|tokenizer\.model|consolidated\.\d\d\.pth")
PART_OF = re.compile(r"-\d{5}-of-\d{5}")
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
DEVICE = re.compile(r"(con|prn|aux|nul|(com|lpt)\d)(\..*)?", re.IGNORECASE)  # on Windows, in every folder
NO_MODEL = re.compile(r"mmproj|imatrix")  # GGUF files beside a model
# The choice without a quantization: the first of these that is there. All run as they are stored.
PREFERRED = (
    *("Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1", "Q5_K_M", "Q5_K_S", "Q5_0", "Q5_1", "Q6_K", "Q8_0"),
    *("BF16", "F16", "F32", "Q4", "FP16"),
)
PATIENCE = 1.0  # seconds for a lock, before a remark
TRIES = 5  # connections one after another that bring no byte
ELSEWHERE = "HF_HOME can name another folder"
SHOWN = 12  # file names in a message


class Name(NamedTuple):
    """The parts of hf:OWNER/REPO[@REVISION][:FILE]. `file` may be a quantization."""

    repo: str
    revision: str
    file: str | None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}" + (f"@{self.revision}" if self.revision != "main" else "")


def parse(text: str) -> Name:
    """The parts of a name; ParameterError if it is none."""
    found = _NAME.fullmatch(text)
    if found and (".." in text or re.search(r"--|\.git$", found["repo"])):
        found = None
    if not found or not all(is_plain(found[part] or "x") for part in ("revision", "file")):
        raise ParameterError(f"{escape(text, 120)} is no name of a model of the Hub, wanted {FORM}")
    return Name(found["repo"], found["revision"] or "main", found["file"])


def is_plain(name: str) -> bool:
    """Whether a name in a repository is that of a file in a folder: no .., no absolute path, no device."""
    return all(
        SHARD.fullmatch(part) and part[-1] != "." and not DEVICE.fullmatch(part) for part in name.split("/")
    )


class File(NamedTuple):
    """A file as the Hub announces it: the SHA-256 of its bytes, or for a small file git's SHA-1 of it."""

    name: str
    size: int
    checksum: str


Wanted = Literal["model", "adapter", "either", "tokenizer"]


def fetch(text: str, progress: Progress, wanted: Wanted = "model") -> Path:
    """The file or folder of what is wanted of a repository. What is not in the cache is fetched."""
    repository = _repository(parse(text))
    try:
        names = _needed(repository, wanted, progress)
    except DownloadError as error:
        problem = f"{repository.problem}; " if repository.problem else ""
        raise DownloadError(f"{problem}{error}") from None
    repository.get(names, progress)
    if wanted != "tokenizer" or not os.path.exists(repository.ref):  # an older model there is whole
        repository.name_commit()
    if repository.problem and not _library().constants.HF_HUB_OFFLINE:  # offline is the user's choice
        _log.warning("%s; what is in the cache is used", repository.problem)
    return repository.path(names[0]) if names[0].endswith(".gguf") else repository.folder


def _library() -> Any:
    _check_endpoint()
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors, utils  # noqa: F401  they become its attributes
    except ImportError:
        raise UnsupportedError(
            'models of the Hugging Face Hub need huggingface_hub: pip install "numpy_llama[hub]"'
        ) from None
    except ValueError as error:  # it reads the environment when it is imported
        raise DownloadError(f"huggingface_hub does not start, look at the variables HF_*: {error}") from None
    return huggingface_hub


def _check_endpoint() -> None:
    """DownloadError if HF_ENDPOINT is no address. The errors of huggingface_hub do not name it."""
    value = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        parts = urlsplit(value)
        has_host = bool((parts.hostname or "").encode("idna")) and parts.port != 0
    except ValueError:
        has_host = False
    if not has_host or parts.scheme not in ("http", "https") or not re.fullmatch("[!-~]+", value):
        wanted = "wanted the address of a Hub, such as https://huggingface.co"
        raise DownloadError(f"HF_ENDPOINT is {escape(value, 80)}, {wanted}")


def _connection() -> None:
    """DownloadError if the client does not start: it reads proxies and certificates from the environment."""
    try:
        _library().get_session()
    except Exception as error:  # of several packages, without a root
        found = f"{type(error).__name__}: {escape(str(error), 160)[1:-1]}"
        wanted = "look at HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE"
        raise DownloadError(f"the connection cannot be made, {wanted} ({found})") from None


def _where() -> str:
    """The address of the Hub, with the variable that gives it."""
    name = "HF_ENDPOINT " if "HF_ENDPOINT" in os.environ else ""
    return name + escape(_library().constants.ENDPOINT, 80)[1:-1]


@dataclass
class Repository:
    """The files of one commit. Without the Hub they are those in the cache."""

    name: Name
    root: Path  # models--OWNER--REPO in the cache
    commit: str
    files: dict[str, File]
    problem: str | None = None  # why the Hub did not describe them
    architecture: str | None = None  # of its GGUF files
    base: str | None = None  # the model that an adapter belongs to
    has_waited: bool = False  # for another program that fetches the same files

    def __str__(self) -> str:
        return f"{self.name} in the cache" if self.problem else str(self.name)

    @property
    def folder(self) -> Path:
        return self.root / "snapshots" / self.commit

    @property
    def ref(self) -> Path:
        return self.root / "refs" / self.name.revision

    def path(self, name: str) -> Path:
        return self.folder / name

    def get(self, names: Sequence[str], progress: Progress) -> None:
        """Fetch the files that are not in the cache."""
        with _explained(self.name):
            missing = [self.files[name] for name in names if not self._is_there(self.files[name])]
            if missing:
                self._get(missing, progress)

    def _get(self, missing: Sequence[File], progress: Progress) -> None:
        blobs = self.root / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        new = [file for file in missing if not (blobs / file.checksum).exists()]
        parts = [blobs / f"{file.checksum}.incomplete" for file in new]
        total, done = sum(file.size for file in new), 0
        left = total - sum(_size_of(part) for part in parts)
        if (free := shutil.disk_usage(blobs).free) < left:
            what = f"{self.name} needs {left:,} more bytes, the disk of {blobs} has {free:,} left"
            raise ResourceLimitError(f"{what}; {ELSEWHERE}")
        for file in missing:
            blob = blobs / file.checksum
            with self._lock(file):
                # Another program may have fetched it.
                if not _is_whole(blob, file) and not self._is_there(file):
                    self._download(file, blob, done, total, progress)
                self._link(file, blob)
            done += file.size if file in new else 0

    def _download(self, file: File, blob: Path, done: int, total: int, progress: Progress) -> None:
        try:
            _Download(self.name, self.commit, file, blob, done, total, progress).run()
        except KeyboardInterrupt:
            _log.warning("%s: what was fetched is kept, and the next fetch continues it", self.name)
            raise

    @contextmanager
    def _lock(self, file: File) -> Iterator[None]:
        """huggingface_hub's lock of a blob: programs that want the same file fetch it once."""
        path = self.root.parent / ".locks" / self.root.name / f"{file.checksum}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _library().utils.WeakFileLock
        with ExitStack() as stack:
            try:
                stack.enter_context(lock(path, timeout=None if self.has_waited else PATIENCE))
            except TimeoutError:
                self.has_waited = True  # one remark is enough
                _log.warning("%s: another program fetches %s: this one waits for it", self.name, file.name)
                stack.enter_context(lock(path))
            yield

    def name_commit(self) -> None:
        """Note that the revision is this commit, of which all that is needed is in the cache now.

        A cache that cannot be written to may have the model all the same.
        """
        if self.problem or self.commit == self.name.revision:
            return
        with suppress(OSError):
            if not self.ref.is_file() or _commit_in(self.ref) != self.commit:
                self.ref.parent.mkdir(parents=True, exist_ok=True)
                part = self.ref.with_name(f"{self.ref.name}.{os.getpid()}.part")
                part.write_text(self.commit, encoding="utf-8")
                part.replace(self.ref)

    def _is_there(self, file: File) -> bool:
        return _is_whole(self.path(file.name), file)

    def _link(self, file: File, blob: Path) -> None:
        path = self.path(file.name)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a link to a file that is gone
        try:
            path.symlink_to(os.path.relpath(blob, path.parent))
        except FileExistsError:  # another program has made it
            pass
        except OSError:  # a file system without links
            os.replace(blob, path)


def _is_whole(path: Path, file: File) -> bool:
    """Whether these bytes are there; DownloadError if their number is wrong."""
    if not path.exists():
        return False
    if (found := path.stat().st_size) != file.size:
        what = f"has {found:,} bytes, the Hub announces {file.size:,}: delete it"
        raise DownloadError(f"{path.resolve()} {what}")
    return True


def _size_of(part: Path) -> int:
    """The bytes of a part: none if there is none, or if another program gives it its name meanwhile."""
    try:
        return part.stat().st_size
    except FileNotFoundError:
        return 0


def _repository(name: Name) -> Repository:
    """The repository as the Hub has it now; if the Hub does not describe it, as it is in the cache.

    A token expires and a repository becomes private: what was fetched before still runs.
    """
    library = _library()
    root = Path(library.constants.HF_HUB_CACHE).absolute() / f"models--{name.repo.replace('/', '--')}"
    rest = ""
    try:
        _connection()
        info = library.HfApi(library_name="numpy_llama").model_info(
            name.repo,
            revision=name.revision,
            files_metadata=True,
            timeout=library.constants.HF_HUB_ETAG_TIMEOUT,
        )
        return _announced(name, root, info)
    except DownloadError as error:
        problem = f"{name}: {error}"
    except UnicodeEncodeError:
        problem = f"{name}: HF_TOKEN has characters that no token has"
    except library.errors.HfHubHTTPError as error:
        problem = _answer(name, error)
    except (OSError, _http_error()) as error:
        problem, rest = _unreached(name, error), "; the cache has no whole copy of it"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        found = f"{type(error).__name__}: {escape(str(error), 120)}"
        problem = f"{name}: the answer of {_where()} cannot be read ({found})"
    with _explained(name):
        cached = _cached(name, root, problem)
    if cached is None:
        raise DownloadError(problem + rest)
    return cached


def _announced(name: Name, root: Path, info: Any) -> Repository:
    """The repository that the Hub describes."""
    if not re.fullmatch("[0-9a-f]{40}", str(info.sha)):
        raise DownloadError(f"the Hub names the commit {escape(info.sha, 60)}")
    files = {}
    for one in info.siblings or []:
        if not isinstance(one.rfilename, str):
            raise DownloadError(f"the Hub names a file {escape(one.rfilename, 60)}")
        checksum = one.lfs.sha256 if one.lfs else one.blob_id
        files[one.rfilename] = File(one.rfilename, one.size, checksum)
    architecture = info.gguf.get("architecture") if isinstance(info.gguf, dict) else None
    base = getattr(info.card_data, "base_model", None)
    base = base if isinstance(base, str) else None
    return Repository(name, root, info.sha, files, None, architecture, base)


def _commit_in(ref: Path) -> str:
    return ref.read_text(encoding="utf-8", errors="replace").strip()


def _cached(name: Name, root: Path, problem: str) -> Repository | None:
    """The repository as it is in the cache, or None if nothing of that revision is there."""
    ref = root / "refs" / name.revision
    commit = _commit_in(ref) if ref.is_file() else name.revision
    folder = root / "snapshots" / commit
    if not re.fullmatch("[0-9a-f]{40}", commit) or not folder.is_dir():
        return None
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    return Repository(name, root, commit, {one: File(one, size, "") for one, size in names.items()}, problem)


# --- the files that a model needs


def _needed(repository: Repository, wanted: Wanted, progress: Progress) -> list[str]:
    """The names of the files of what is wanted. The first is a GGUF file if the model is one."""
    name, files = repository.name, repository.files
    ggufs = _gguf_models(repository)
    weights = next((one for one in WEIGHTS if one in files), None)
    meta = [one for one in files if META.fullmatch(one)]
    is_adapter = ADAPTER in files and not weights and name.file is None
    if wanted == "adapter" or (wanted == "either" and is_adapter):
        return _adapter(repository, ggufs)
    if name.file is not None or (ggufs and not weights):
        names = _chosen_gguf(repository, ggufs)
        if known := other_architecture(repository.architecture):
            raise UnsupportedError(f"{name}: the architecture is {known}")
        return _checked(repository, names)
    if wanted == "tokenizer":
        return _tokenizer(repository, [] if weights else meta)
    if is_adapter:
        base = f", the model {escape(repository.base, 80)[1:-1]}," if repository.base else ""
        raise UnsupportedError(
            f"{name} is an adapter (LoRA): name its base{base} with -m, and this with --adapter, "
            "in Python load(base, adapter=...)"
        )
    if not weights and len(meta) >= 3:
        return _checked(repository, sorted(meta, reverse=True))
    if not weights or "config.json" not in files:
        if known := other_folder(files):
            raise UnsupportedError(f"{name} holds {known}")
        raise DownloadError(f"{repository} has no model that can be fetched; there is: {_listed(files)}")
    beside = [one for one in BESIDE if one in files]
    settings = [one for one in ("config.json", *quantized.BESIDE) if one in files]
    repository.get(_checked(repository, settings, MAX_BYTES), progress)
    model_args(JsonFile(repository.path("config.json")))  # a model that does not run: before its weights
    shards = [weights]
    if weights.endswith(".index.json"):
        repository.get(_checked(repository, [weights], MAX_BYTES), progress)
        shards += _shards(repository, weights)
    return _checked(repository, beside, MAX_BESIDE) + _checked(repository, shards)


def _adapter(repository: Repository, ggufs: dict[str, list[str]]) -> list[str]:
    """The names of the files of an adapter: those of PEFT, or a GGUF."""
    files = repository.files
    if repository.name.file is None:
        weights = [one for one in ADAPTER_WEIGHTS if one in files][:1]
        if ADAPTER in files and weights:
            return _checked(repository, [ADAPTER], MAX_BYTES) + _checked(repository, weights)
        if not ggufs:
            wanted = f"wanted {ADAPTER} with {' or '.join(ADAPTER_WEIGHTS)}, or a GGUF"
            raise DownloadError(f"{repository} has no adapter, {wanted}; there is: {_listed(files)}")
    return _checked(repository, _chosen_gguf(repository, ggufs))


def _tokenizer(repository: Repository, meta: list[str]) -> list[str]:
    """The names of the files of a tokenizer. Its model need not run here, and may be absent."""
    names = [one for one in meta if not one.endswith(".pth")] if len(meta) >= 3 else []
    names = names or [one for one in TOKENIZER if one in repository.files]
    if not {"tokenizer.json", "tokenizer.model"}.intersection(names):
        there = _listed(repository.files)
        raise DownloadError(f"{repository} has no tokenizer.json and no tokenizer.model; there is: {there}")
    return _checked(repository, names, MAX_BESIDE)


def _shards(repository: Repository, index: str) -> list[str]:
    weight_map = JsonFile(repository.path(index)).get("weight_map", dict, {})
    shards = sorted({str(one) for one in weight_map.values()})
    if missing := [one for one in shards if one not in repository.files]:
        raise DownloadError(f"{repository}: {index} names {_listed(missing)}, which is not there")
    return shards


def _checked(repository: Repository, names: list[str], most: int | None = None) -> list[str]:
    """The names, if they are plain, and if size and checksum are announced."""
    for one in names:
        file = repository.files[one]
        if not is_plain(one):
            raise DownloadError(f"{repository.name}: {escape(one, 80)} is no plain file name")
        known = repository.problem or re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", str(file.checksum))
        if type(file.size) is not int or file.size < 0 or not known:
            found = f"{escape(file.size, 40)} bytes, checksum {escape(file.checksum, 80)}"
            raise DownloadError(f"{repository.name}: the Hub announces {one} with {found}")
        if most is not None and file.size > most:
            found = f"{one} has {file.size:,} bytes"
            raise DownloadError(f"{repository.name}: {found}, at most {most:,} are read")
    return names


def _gguf_models(repository: Repository) -> dict[str, list[str]]:
    """The GGUF files of each model. A split model has several, under the name of its first."""
    found: dict[str, list[str]] = {}
    for name in sorted(repository.files):
        if not name.lower().endswith(".gguf") or NO_MODEL.search(name.lower()):
            continue
        split = SPLIT.fullmatch(name)
        first = f"{split[1]}-00001-of-{split[3]}.gguf" if split else name
        found.setdefault(first, []).append(name)
    return found


def _chosen_gguf(repository: Repository, models: dict[str, list[str]]) -> list[str]:
    """The files of the one model that is meant."""
    wanted = repository.name.file
    files = {file: first for first, files in models.items() for file in files}
    same = [first for file, first in files.items() if wanted in (file, file.rpartition("/")[2])]
    if wanted is None:
        found = next((hits for one in PREFERRED if (hits := _plainest(models, one))), list(models))
    elif not (found := list(dict.fromkeys(same))):
        found = _plainest(models, wanted)
        if len(found) == 1 and (others := [one for one in _matching(models, wanted) if one not in found]):
            _log.warning("%s:%s is %s; there is also %s", repository.name, wanted, found[0], _listed(others))
    if not found:
        there = _listed(models or repository.files)
        raise DownloadError(f"{repository} has no GGUF {escape(wanted, 80)[1:-1]}; there is: {there}")
    if len(found) > 1:
        raise DownloadError(f"{repository} has several models, name one file: {_listed(found)}")
    names = models[found[0]]
    if (split := SPLIT.fullmatch(found[0])) and len(names) != int(split[3]):
        raise DownloadError(f"{repository}: {len(names)} of {int(split[3])} parts of {found[0]} are there")
    return names


def _matching(models: dict[str, list[str]], quantization: str) -> list[str]:
    """The models whose names have the quantization as a word: q4_k_m in a-Q4_K_M.gguf, not in Q4_K_M_L."""
    word = re.compile(rf"(?<![a-z0-9]){re.escape(quantization)}(?![a-z0-9_])", re.IGNORECASE)
    return [first for first in models if word.search(PART_OF.sub("", first))]


def _plainest(models: dict[str, list[str]], quantization: str) -> list[str]:
    """The models with the quantization; only m-Q4_K_M if all others are m with more words: m-UD-Q4_K_M.

    That one is the shortest name that ends in the quantization. What stands before it begins every other
    name: of m-7b-Q4_0 and m-13b-Q4_0 neither is chosen.
    """
    found = _matching(models, quantization)
    stems = {one: PART_OF.sub("", one.rpartition("/")[2].lower()).removesuffix(".gguf") for one in found}
    exact = [one for one in found if re.search(rf"[-._]{re.escape(quantization.lower())}$", stems[one])]
    if not exact:
        return found
    best = min(exact, key=lambda one: len(stems[one]))
    stem = stems.pop(best)
    begins = re.compile(re.escape(stem[: -len(quantization) - 1]) + "[-._]")
    return [best] if all(one != stem and begins.match(one) for one in stems.values()) else found


def _listed(names: Sequence[str] | dict[str, Any]) -> str:
    """File names for a message."""
    shown = ", ".join(escape(one, 80)[1:-1] for one in list(names)[:SHOWN])
    return (shown or "nothing") + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


# --- one file


@dataclass
class _Download:
    """The transfer of one file into the cache."""

    name: Name
    commit: str
    file: File
    blob: Path
    before: int  # bytes of the files before this one
    total: int  # bytes of all files
    progress: Progress
    digest: Any = field(init=False)  # of the bytes so far

    def run(self) -> None:
        part = self.blob.with_name(f"{self.blob.name}.incomplete")
        wanted = self.file.size, self.file.checksum
        with part.open("a+b") as out:
            self._begin()
            out.seek(0)
            while block := out.read(1 << 20):
                self.digest.update(block)
            left = out.tell()  # by an earlier fetch, perhaps of another program
            self._continue(out)
            if left and (out.tell(), self.digest.hexdigest()) != wanted:
                what = "what an earlier fetch left of it is damaged"
                _log.warning("%s: %s is fetched anew, %s", self.name, self.file.name, what)
                self._restart(out)
                self._continue(out)
            sync(out)
            found = out.tell(), self.digest.hexdigest()
        if found != wanted:
            part.unlink()
            raise DownloadError(
                f"{self.name}: {self.file.name} came with {found[0]:,} bytes and checksum {found[1]}, "
                f"the Hub announces {self.file.size:,} and {self.file.checksum}; it was removed"
            )
        os.replace(part, self.blob)

    def _continue(self, out: BinaryIO) -> None:
        """Append the bytes that are missing."""
        most, failures = out.tell(), 0
        while out.tell() < self.file.size:
            error = self._transfer(out)
            failures = 0 if out.tell() > most else failures + 1
            most = max(most, out.tell())
            if failures == TRIES:
                raise error or DownloadError(f"{self.name}: the Hub sends no more of {self.file.name}")
            time.sleep(failures)

    def _restart(self, out: BinaryIO) -> None:
        out.truncate(0)
        out.seek(0)
        self._begin()

    def _begin(self) -> None:
        if len(self.file.checksum) == 64:
            self.digest = hashlib.sha256()
        else:  # as git hashes a file
            self.digest = hashlib.sha1(b"blob %d\0" % self.file.size, usedforsecurity=False)

    def _transfer(self, out: BinaryIO) -> Exception | None:
        """Append what the Hub sends from the end of `out` on; -> the error that cut the connection."""
        library, start = _library(), out.tell()
        headers = library.utils.build_hf_headers(library_name="numpy_llama") | {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        url = library.hf_hub_url(self.name.repo, self.file.name, revision=self.commit)
        seconds = library.constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            with library.get_session().stream("GET", url, headers=headers, timeout=seconds) as response:
                if response.status_code != 416:  # what is here already is longer than the file
                    library.hf_raise_for_status(response)
                there = response.headers.get("Content-Range", "")
                if start and not (response.status_code == 206 and there.startswith(f"bytes {start}-")):
                    self._restart(out)  # the Hub sends all of it again
                if response.status_code == 416:
                    return None
                for block in response.iter_bytes():
                    out.write(block)
                    self.digest.update(block)
                    if out.tell() > self.file.size:
                        break
                    self.progress(f"fetching {self.file.name}", self.before + out.tell(), self.total)
        except _http_error() as error:
            if isinstance(error, library.errors.HfHubHTTPError):  # an answer, not a cut
                raise
            return error
        return None


# --- what can go wrong


def _http_error() -> type[Exception]:
    """The root of the errors of the HTTP client, whichever client huggingface_hub uses."""
    root: type[Exception] = _library().errors.HfHubHTTPError.__bases__[0]
    return root


@contextmanager
def _explained(name: Name) -> Iterator[None]:
    """Errors of huggingface_hub and of the disk, as one line that says what to do."""
    try:
        yield
    except _library().errors.HfHubHTTPError as error:
        raise DownloadError(_answer(name, error)) from None
    except _http_error() as error:
        raise DownloadError(_unreached(name, error)) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise ResourceLimitError(
                f"{name}: the disk is full; what was fetched is kept, and the next fetch continues it"
            ) from None
        raise DownloadError(f"{name} cannot be kept in the cache: {error}; {ELSEWHERE}") from None


def _unreached(name: Name, error: Exception) -> str:
    """Why the Hub was not reached."""
    if isinstance(error, _library().errors.OfflineModeIsEnabled):
        return f"{name}: HF_HUB_OFFLINE forbids to ask the Hub"
    found = f"{type(error).__name__}: {escape(str(error), 120)[1:-1]}"
    return f"{name}: {_where()} cannot be reached ({found})"


def _answer(name: Name, error: Any) -> str:
    """The message for an answer of the Hub that is an error."""
    errors, page = _library().errors, f"{_library().constants.ENDPOINT}/{name.repo}"
    login = "set HF_TOKEN, or run `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its licence on {page}, then {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the Hub has no model {name.repo}, or it is private: check the name, or {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name.repo} has no revision {name.revision}: {page}/tree/main lists them"
    status = error.response.status_code
    if status in (401, 403):
        return f"{name}: the Hub refuses access ({status}), or the token is wrong: {login}"
    if status == 404 and "/api/" in str(error.response.url):
        return f"{name}: {_where()} is no Hub (404)"
    if status == 404:
        return f"{name}: the Hub does not have a file that it lists (404)"
    if status == 429:
        return f"{name}: the Hub has had too many requests (429): wait some minutes, or {login}"
    return f"{name}: the Hub answers with an error ({status}): try again later"
