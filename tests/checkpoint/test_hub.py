"""Models of the Hugging Face Hub, which a thread of the test serves to the real client."""

import errno
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from helpers.command_line import written
from helpers.hub import COMMIT, checksum, served
from helpers.tiny_models import SPEAKER, write_speaker
from helpers.tokenizers import byte_level_metadata, hugging_face
from helpers.updates import SOME, random_updates
from huggingface_hub import constants, utils

import numpy_llama as nl
from numpy_llama.checkpoint import hub as client
from numpy_llama.checkpoint import is_meta
from numpy_llama.checkpoint.adapters import write_gguf, write_peft
from numpy_llama.checkpoint.download import locate, on_the_hub, pull
from numpy_llama.checkpoint.huggingface import WEIGHTS
from numpy_llama.checkpoint.repositories import REPOSITORIES
from numpy_llama.errors import DownloadError, ParameterError, ResourceLimitError, UnsupportedError

GGUF = b"GGUF" + bytes(range(256)) * 800  # more than the sockets hold between two reads
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    **{"vocab_size": 300, "rms_norm_eps": 1e-5, "max_position_embeddings": 64},
}
SHARDS = {f"model-0000{i}-of-00002.safetensors": b"shard %d" % i for i in (1, 2)}
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}


def as_json(value) -> bytes:
    return json.dumps(value).encode()


FOLDER = SHARDS | {
    "config.json": as_json(CONFIG),
    "model.safetensors.index.json": as_json(INDEX),
    **{"generation_config.json": b"{}", "tokenizer.json": b'{"t": 1}', "tokenizer_config.json": b'{"c": 1}'},
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
}
NOT_NEEDED = {
    **{"README.md": b"# A model", ".gitattributes": b"", "modeling_llama.py": b"raise SystemExit"},
    **{"pytorch_model.bin": b"pickle", "original/consolidated.00.pth": b"pickle", "model.onnx": b"x"},
    **{"original/params.json": b"{}", "optimizer.pt": b"x", "training_args.bin": b"x"},
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with a GGUF repository and a folder of safetensors, and an empty cache."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with served() as hub:
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patience = {"HF_HUB_ETAG_TIMEOUT": 300, "HF_HUB_DOWNLOAD_TIMEOUT": 300}  # a machine may be slow
        changes = patience | {
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
        }
        paths = {"HF_HUB_CACHE": "cache", "HF_TOKEN_PATH": "token", "AGENT_HARNESSES_PATH": "harnesses"}
        for name, value in (changes | {key: str(tmp_path / one) for key, one in paths.items()}).items():
            monkeypatch.setattr(constants, name, value, raising=False)  # the versions differ
        hub.repositories["o/gguf"] = {"README.md": b"", "m-Q4_K_M.gguf": GGUF, "m-Q8_0.gguf": GGUF + b"8"}
        hub.repositories["o/folder"] = FOLDER | NOT_NEEDED
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def unreachable(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")


def refused(name: str, words: str, error=DownloadError) -> str:
    with pytest.raises(error, match=words) as caught:
        pull(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def remarks(caplog) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name.startswith("numpy_llama")]


def asked(hub, name: str) -> list[str | None]:
    """The ranges of a file that were asked for."""
    return [one.range for one in hub.requests if one.path.startswith("/cdn/") and one.path.endswith(name)]


# --- what is fetched


def test_one_quantization_of_many(hub):
    news = []
    path = pull("hf:o/gguf", lambda *one: news.append(one))
    assert path.name == "m-Q4_K_M.gguf" and path.read_bytes() == GGUF
    assert hub.contents() == ["m-Q4_K_M.gguf"]
    assert news[-1] == ("fetching m-Q4_K_M.gguf", len(GGUF), len(GGUF))
    assert pull("hf:o/gguf") == locate("hf:o/gguf:q4_k_m") == path
    assert hub.contents() == []  # nothing is fetched twice
    assert (
        locate("hf:o/gguf:Q8_0").read_bytes() == locate("hf:o/gguf:m-Q8_0.gguf").read_bytes() == GGUF + b"8"
    )
    assert hub.contents() == ["m-Q8_0.gguf"]


def test_only_the_files_of_a_folder_that_a_model_needs(hub):
    folder = pull("hf:o/folder")
    files = (path for path in folder.rglob("*") if path.is_file())
    assert {path.relative_to(folder).as_posix(): path.read_bytes() for path in files} == FOLDER
    assert hub.contents() == sorted(name.rpartition("/")[2] for name in FOLDER)
    assert pull("hf:o/folder") == folder and hub.contents() == []


def test_config_comes_first_and_stops_a_model_that_does_not_run(hub):
    for change, words in [
        ({"model_type": "qwen2"}, "model_type 'qwen2', a Qwen: nothing here runs it"),
        ({"quantization_config": {"quant_method": "exl2"}}, "quantized by 'exl2'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "a classifier"),
    ]:
        hub.repositories["o/folder"]["config.json"] = as_json(CONFIG | change)
        hub.commit = checksum("", words.encode())
        refused("hf:o/folder", words, UnsupportedError)
        assert hub.contents() == ["config.json"]


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("quantize_config.json", {"bits": 5}, "GPTQ of 5 bits; run are"),
        ("quantize_config.json", {"bits": 4, "is_marlin_format": True}, "GPTQ weights stored as 'marlin'"),
        ("quant_config.json", {"w_bit": 3}, "AWQ"),
    ],
)
def test_settings_beside_the_config_come_before_the_weights(hub, name, settings, words):
    hub.repositories["o/folder"] |= {name: as_json(settings)}
    refused("hf:o/folder", words, UnsupportedError)
    assert hub.contents() == ["config.json", name]


@pytest.mark.parametrize("weights", WEIGHTS[::2])
def test_the_best_weights_that_are_there(hub, weights):
    files = dict.fromkeys([*WEIGHTS[WEIGHTS.index(weights) :: 2], "consolidated.00.pth", "x.py"], b"w")
    hub.repositories["o/m"] = files | {"config.json": as_json(CONFIG)}
    pull("hf:o/m")
    assert hub.contents() == ["config.json", weights]


def test_a_download_of_meta(hub):
    files = ["params.json", "tokenizer.model", "consolidated.00.pth", "consolidated.01.pth"]
    hub.repositories["o/m"] = dict.fromkeys([*files, "example.py", "LICENSE.txt"], b"x")
    assert sorted(path.name for path in pull("hf:o/m").iterdir()) == sorted(files)


def test_a_tokenizer_comes_without_the_weights(hub, monkeypatch, tmp_path):
    path = tmp_path / "tokenizer.json"
    hugging_face(byte_level_metadata()).save(str(path))
    files = {"tokenizer.json": path.read_bytes(), "config.json": as_json({"model_type": "qwen2"})}
    hub.repositories["o/m"] = files | {"model.safetensors": b"x", "vocab.json": b"", "README.md": b""}
    ids = nl.load_tokenizer("hf:o/m").encode("ab")
    assert ids == nl.load_tokenizer(path).encode("ab") and hub.contents() == sorted(files)
    del hub.repositories["o/m"]["model.safetensors"]  # a tokenizer may stand alone
    assert nl.load_tokenizer("hf:o/m").encode("ab") == ids and hub.contents() == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert nl.load_tokenizer("hf:o/m").encode("ab") == ids
    refused("hf:o/m", "has no model that can be fetched; there is: config.json, tokenizer.json")


def test_the_tokenizer_of_a_download_of_meta(hub):
    files = {name: b"x" for name in ("params.json", "tokenizer.model", "consolidated.00.pth", "LICENSE")}
    hub.repositories["o/m"] = files
    folder = locate("hf:o/m", wanted="tokenizer")
    assert hub.contents() == ["params.json", "tokenizer.model"] and is_meta(folder)


def test_a_tokenizer_in_a_gguf_needs_the_file(hub):
    hub.repositories["o/gguf"]["tokenizer.json"] = b"{}"
    assert locate("hf:o/gguf", wanted="tokenizer").read_bytes() == GGUF
    hub.repositories["o/none"] = {"config.json": b"{}", "model.safetensors": b""}
    with pytest.raises(DownloadError, match=r"has no tokenizer\.json and no tokenizer\.model; there is"):
        locate("hf:o/none", wanted="tokenizer")


def test_a_tokenizer_does_not_hide_an_older_model(hub, monkeypatch):
    old = pull("hf:o/folder")
    hub.commit, hub.repositories["o/folder"]["tokenizer.json"] = "2" * 40, b'{"t": 2}'
    new = locate("hf:o/folder", wanted="tokenizer")
    assert new != old and (new / "tokenizer.json").read_bytes() == b'{"t": 2}'
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull("hf:o/folder") == old


@pytest.fixture
def adapters(hub, tmp_path):
    """A model, and the same adapter on the Hub in two forms; -> the model's path."""
    speaker = write_speaker(tmp_path / "m.gguf")
    names = {name: rank for name, rank in SOME.items() if name != "output.weight"}  # the vocabularies differ
    updates, folder = random_updates(1, names), tmp_path / "lora"
    write_peft(folder, updates, SPEAKER)
    write_gguf(tmp_path / "lora.gguf", updates, SPEAKER)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repositories["o/lora"] = files | {"README.md": b"", "tokenizer.json": b"{}", "optimizer.pt": b""}
    hub.repositories["o/lora-gguf"] = {"l-F16.gguf": (tmp_path / "lora.gguf").read_bytes(), "x.gguf": b"x"}
    return speaker


def test_an_adapter_of_the_hub(hub, adapters, tmp_path):
    def logits(adapter=None):
        return nl.load(adapters, backend="numpy", adapter=adapter).model(np.array([[1, 2, 3]]))

    whole, half = logits(tmp_path / "lora"), logits(f"{tmp_path}/lora:0.5")
    assert np.abs(whole - logits()).max() > 0.01
    assert (logits("hf:o/lora") == whole).all()
    assert hub.contents() == ["adapter_config.json", "adapter_model.safetensors"]
    for name in ("hf:o/lora:0.5", f"hf:o/lora@{COMMIT}:0.5"):
        assert (logits(name) == half).all() and hub.contents() == []
    for name in ("hf:o/lora-gguf", "hf:o/lora-gguf:f16:1", "hf:o/lora-gguf:l-F16.gguf:1.0"):
        np.testing.assert_allclose(logits(name), whole, rtol=1e-4, atol=1e-5)
    assert hub.contents() == ["l-F16.gguf"]
    assert pull("hf:o/lora").joinpath("adapter_config.json").is_file() and hub.contents() == []


def test_what_is_no_adapter(hub, adapters):
    hub.repositories["o/cut"] = {"adapter_config.json": b"{}", "README.md": b""}
    wanted = r"wanted adapter_config.json with adapter_model.safetensors or adapter_model.bin, or a GGUF"
    for name, words in [
        ("hf:o/folder", f"hf:o/folder has no adapter, {wanted}; there is: "),
        ("hf:o/cut:0.5", f"hf:o/cut has no adapter, {wanted}; there is: adapter_config.json, README.md"),
        ("hf:o/none", "the Hub has no model o/none"),
        ("hf:o/lora:f32", "hf:o/lora has no GGUF f32"),
    ]:
        with pytest.raises(DownloadError, match=words):
            nl.load(adapters, backend="numpy", adapter=name)
    assert hub.contents() == []


PARTS = [f"Q8_0/m-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.mark.parametrize("ask", ["", ":q8_0", f":{PARTS[0]}", f":{PARTS[2]}", ":m-Q8_0-00002-of-00003.gguf"])
def test_a_split_model_has_all_its_parts(hub, ask):
    hub.repositories["o/split"] = {name: name.encode() for name in PARTS}
    path = pull(f"hf:o/split{ask}")
    assert path.as_posix().endswith(PARTS[0])
    assert [one.read_bytes().decode() for one in sorted(path.parent.iterdir())] == PARTS
    del hub.repositories["o/split"][PARTS[1]]
    refused(f"hf:o/split{ask.replace('0002-', '0001-')}", "2 of 3 parts of Q8_0/m-Q8_0-00001-of-00003.gguf")


@pytest.mark.parametrize(
    "names, wanted",
    [
        (["m-Q2_K.gguf", "m-q5_k_m.gguf", "m-F16.gguf", "mmproj-Q4_K_M.gguf"], "m-q5_k_m.gguf"),
        (["m.Q4_K_M.gguf", "m.Q4_K_M_L.gguf", "m.IQ4_XS.gguf"], "m.Q4_K_M.gguf"),
        (["m-bf16.gguf", "m-f16.gguf"], "m-bf16.gguf"),
        (["model.gguf", "model.imatrix.gguf"], "model.gguf"),
        (["m-IQ2_M.gguf"], "m-IQ2_M.gguf"),
    ],
)
def test_the_choice_without_a_quantization(hub, names, wanted):
    hub.repositories["o/m"] = dict.fromkeys(names, b"x")
    assert pull("hf:o/m").name == wanted


@pytest.mark.parametrize(
    "names, wanted",
    [
        (["M-UD-Q4_K_M.gguf", "M-Q4_K_M.gguf"], "M-Q4_K_M.gguf"),
        (["M.i1-Q4_K_M.gguf", "M.Q4_K_M.gguf"], "M.Q4_K_M.gguf"),
        (["M-Q4_K_M-imat.gguf", "M-q4_k_m.gguf", "old/M-v0-Q4_K_M.gguf"], "M-q4_k_m.gguf"),
        (
            ["UD/M-UD-Q4_K_M-00001-of-00001.gguf", "M-Q4_K_M-00001-of-00001.gguf"],
            "M-Q4_K_M-00001-of-00001.gguf",
        ),
        (["M-7b-Q4_K_M.gguf", "M-13b-Q4_K_M.gguf"], None),
        (["M-7b-Q4_K_M.gguf", "M-70b-Q4_K_M.gguf"], None),
        (["a/M-Q4_K_M.gguf", "b/M-Q4_K_M.gguf"], None),
        (["M-UD-Q4_K_M.gguf", "M-i1-Q4_K_M.gguf"], None),
        (["M-Q4_K_M-a.gguf", "M-Q4_K_M-b.gguf"], None),
    ],
)
@pytest.mark.parametrize("asked", [":Q4_K_M", ""])
def test_the_quantization_without_a_word_more(hub, caplog, names, wanted, asked):
    hub.repositories["o/m"] = dict.fromkeys(names, b"x")
    if wanted is None:
        refused(f"hf:o/m{asked}", "has several models, name one file: ")
        return
    assert pull(f"hf:o/m{asked}").name == wanted
    others = ", ".join(sorted(set(names) - {wanted}))
    assert remarks(caplog) == ([f"hf:o/m:Q4_K_M is {wanted}; there is also {others}"] if asked else [])
    caplog.clear()
    assert pull(f"hf:o/m:{wanted}").name == wanted and remarks(caplog) == []


def test_several_models_in_a_repository_are_listed(hub):
    hub.repositories["o/m"] = {"a-Q4_0.gguf": b"a", "b-Q4_0.gguf": b"b", "c.gguf": b"c"}
    refused("hf:o/m", "has several models, name one file: a-Q4_0.gguf, b-Q4_0.gguf$")
    refused("hf:o/m:Q4_0", "has several models")
    assert pull("hf:o/m:b-Q4_0.gguf").read_bytes() == b"b"
    hub.repositories["o/n"] = {f"{i}-IQ1_S.gguf": b"" for i in range(20)}
    assert "and 8 more" in refused("hf:o/n", "several models")


def test_a_revision(hub):
    assert pull("hf:o/gguf@main:q8_0") == pull(f"hf:o/gguf@{COMMIT}:q8_0")
    assert "/tree/main" in refused("hf:o/gguf@v9", "o/gguf has no revision v9")


def test_a_revision_with_slashes(hub, monkeypatch):
    hub.branches = ("main", "refs/pr/1")
    path = pull("hf:o/gguf@refs/pr/1:q8_0")
    assert path.name == "m-Q8_0.gguf"
    hub.requests.clear()
    assert huggingface_hub.hf_hub_download("o/gguf", path.name, revision="refs/pr/1") == str(path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull("hf:o/gguf@refs/pr/1:q8_0") == path
    refused("hf:o/gguf:q8_0", "HF_HUB_OFFLINE")


def test_the_model_runs(hub, tmp_path):
    hub.repositories["o/speaker"] = {"m-F32.gguf": write_speaker(tmp_path / "m.gguf").read_bytes()}
    llama = nl.load("hf:o/speaker", backend="numpy")
    assert np.isfinite(llama.model(np.array([[1, 2]]))).all()
    assert nl.load_tokenizer("hf:o/speaker:f32").vocab_size == 259


def test_known_names(hub):
    assert all(client.parse(f"hf:{repository}").file is None for repository in REPOSITORIES.values())
    assert on_the_hub("tinyllama") == "hf:TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF"
    hub.repositories[REPOSITORIES["llama-3.2-1b-instruct"]] = {"L-Q4_K_M.gguf": b"x"}
    assert pull("llama-3.2-1b-instruct").name == locate("llama-3.2-1b-instruct").name == "L-Q4_K_M.gguf"


@pytest.mark.parametrize("way", [pull, locate])
def test_a_name_that_is_none_gets_a_hint(way):
    for name, words in [
        ("llama-3.2-1b-instuct", "did you mean llama-3.2-1b-instruct\\?"),
        ("TinyLLama", "did you mean tinyllama\\?"),
        ("xyz", "names: smollm2-135m-instruct, smollm2-360m-instruct, "),
        ("meta-llama/Llama-2-7b", "of the Hugging Face Hub has the name hf:meta-llama/Llama-2-7b; `numpy-"),
        ("https://huggingface.co/o/r/tree/main", "has the name hf:o/r; `numpy-llama pull` lists the names"),
        ("no/such.gguf", "; `numpy-llama pull` lists the names"),
        ("HF:o/R-1", "of the Hugging Face Hub has the name hf:o/R-1; `numpy-"),
        (" hf:o/r", "has the name hf:o/r; `numpy-"),
        ("hf.co/o/r", "has the name hf:o/r; `numpy-llama pull` lists the names"),
    ]:
        with pytest.raises(DownloadError, match=words):
            way(name)


# --- the cache is everyone's


def test_other_programs_find_the_files(hub, cache):
    path, folder = pull("hf:o/gguf"), pull("hf:o/folder")
    hub.requests.clear()
    assert huggingface_hub.try_to_load_from_cache("o/gguf", path.name) == str(path)
    assert huggingface_hub.hf_hub_download("o/folder", "config.json") == str(folder / "config.json")
    assert [one.method for one in hub.requests if "/resolve/" in one.path] == ["HEAD"]
    info = huggingface_hub.scan_cache_dir(cache)
    assert info.warnings == [] and {one.repo_id for one in info.repos} == {"o/gguf", "o/folder"}


def test_files_of_other_programs_are_found(hub):
    for name in FOLDER:
        huggingface_hub.hf_hub_download("o/folder", name)
    hub.requests.clear()
    folder = pull("hf:o/folder")
    assert hub.contents() == [] and (folder / "config.json").read_bytes() == FOLDER["config.json"]


def test_a_new_commit_fetches_what_changed(hub):
    old = pull("hf:o/folder")
    hub.repositories["o/folder"]["tokenizer.json"] = b"[]"
    hub.commit = "f" * 40
    hub.contents()
    new = pull("hf:o/folder")
    assert hub.contents() == ["tokenizer.json"] and new != old
    assert (new / "tokenizer.json").read_bytes() == b"[]" and (
        old / "tokenizer.json"
    ).read_bytes() == b'{"t": 1}'


def test_without_links(hub, monkeypatch):
    def no_links(self, target):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr("pathlib.Path.symlink_to", no_links)
    path = pull("hf:o/gguf")
    assert path.read_bytes() == GGUF and not path.is_symlink()
    hub.contents()
    assert pull("hf:o/gguf") == path and hub.contents() == []


def test_a_link_that_another_program_makes_meanwhile(hub, monkeypatch):
    """A file system may have no locks. The bytes stay, because other commits have links to them."""
    link = Path.symlink_to
    monkeypatch.setattr(Path, "symlink_to", lambda self, to: [link(self, to) for _ in "12"])
    path = pull("hf:o/gguf")
    assert path.is_symlink() and path.read_bytes() == GGUF


PROGRAMS = {
    "we": lambda: pull("hf:o/gguf"),
    "huggingface_hub": lambda: Path(huggingface_hub.hf_hub_download("o/gguf", "m-Q4_K_M.gguf")),
}


def transfers(hub) -> list[str | None]:
    """The ranges of the bytes that were asked for; huggingface_hub asks for the headers before."""
    return [one.range for one in hub.requests if one.path.startswith("/cdn/") and one.method == "GET"]


def test_who_waits_for_several_files_says_so_once(hub, cache, monkeypatch, caplog):
    monkeypatch.setattr(client, "PATIENCE", 0.01)
    folder = cache / ".locks" / "models--o--folder"
    folder.mkdir(parents=True)
    locks = [utils.WeakFileLock(folder / f"{checksum(name, data)}.lock") for name, data in SHARDS.items()]
    with ThreadPoolExecutor() as pool, locks[1]:
        with locks[0]:
            one = pool.submit(pull, "hf:o/folder")
            while not remarks(caplog):
                assert not one.done()
        while not list(cache.glob("models--o--folder/snapshots/*/model-00001-of-00002.safetensors")):
            assert not one.done()
        with pytest.raises(TimeoutError):
            one.result(0.5)
    assert one.result() and len(remarks(caplog)) == 1


@pytest.mark.parametrize(
    "first, second", [("we", "we"), ("we", "huggingface_hub"), ("huggingface_hub", "we")]
)
def test_two_programs_wait_for_each_other(hub, monkeypatch, caplog, first, second):
    monkeypatch.setattr(client, "PATIENCE", 0.01)
    hub.holds["m-Q4_K_M.gguf"] = 5000
    with ThreadPoolExecutor() as pool:
        one = pool.submit(PROGRAMS[first])
        while not transfers(hub):
            assert not one.done()
        other = pool.submit(PROGRAMS[second])
        with pytest.raises(TimeoutError):
            other.result(0.5)
        assert transfers(hub) == [None]
        hub.released.set()
        assert one.result().read_bytes() == other.result().read_bytes() == GGUF
    assert len(transfers(hub)) == 2  # the Hub has cut the first
    what = "hf:o/gguf: another program fetches m-Q4_K_M.gguf: this one waits for it"
    assert remarks(caplog) == ([what] if second == "we" else [])


# --- cuts


def test_a_cut_is_continued(hub):
    hub.cuts["m-Q4_K_M.gguf"] = [1000, 5000]
    assert pull("hf:o/gguf").read_bytes() == GGUF
    assert asked(hub, "m-Q4_K_M.gguf") == [None, "bytes=1000-", "bytes=6000-"]


def test_the_next_fetch_continues_an_interrupted_one(hub, cache, caplog):
    hub.cuts["m-Q4_K_M.gguf"] = [1000]

    def interrupt(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("hf:o/gguf", interrupt)
    assert remarks(caplog) == ["hf:o/gguf: what was fetched is kept, and the next fetch continues it"]
    (part,) = cache.glob("models--o--gguf/blobs/*")
    assert part.suffix == ".incomplete" and part.read_bytes() == GGUF[:1000]
    hub.cuts.clear()
    hub.requests.clear()
    assert pull("hf:o/gguf").read_bytes() == GGUF and not part.exists()
    assert asked(hub, "m-Q4_K_M.gguf") == ["bytes=1000-"]


@pytest.mark.parametrize("length", [len(GGUF), len(GGUF) + 5, 5])
def test_a_part_that_is_wrong_is_fetched_anew(hub, cache, caplog, length):
    part = cache / "models--o--gguf" / "blobs" / f"{checksum('m.gguf', GGUF)}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"?" * length)
    assert pull("hf:o/gguf").read_bytes() == GGUF and not part.exists()
    what = "m-Q4_K_M.gguf is fetched anew, what an earlier fetch left of it is damaged"
    assert remarks(caplog) == [f"hf:o/gguf: {what}"]
    assert asked(hub, "m-Q4_K_M.gguf")[-1] is None
    part.with_suffix("").unlink()
    part.write_bytes(b"?" * length)
    hub.sent["m-Q4_K_M.gguf"] = GGUF[:-1] + b"?"  # and what comes anew is wrong too
    refused("hf:o/gguf", "the Hub announces .*; it was removed")
    assert not part.exists()


def test_a_part_that_is_whole_is_not_fetched_again(hub, cache):
    part = cache / "models--o--gguf" / "blobs" / f"{checksum('m.gguf', GGUF)}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(GGUF)
    assert pull("hf:o/gguf").read_bytes() == GGUF and hub.contents() == []


def test_a_part_that_another_program_names_meanwhile(hub, monkeypatch):
    """It is gone between two looks at it."""
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: self.suffix == ".incomplete" or exists(self))
    assert pull("hf:o/gguf").read_bytes() == GGUF


def test_a_hub_that_ignores_ranges_sends_all_again(hub, monkeypatch):
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    hub.ignores_ranges = True
    hub.cuts["m-Q4_K_M.gguf"] = [1000, 700]
    assert pull("hf:o/gguf").read_bytes() == GGUF
    assert asked(hub, "m-Q4_K_M.gguf") == [None, "bytes=1000-", "bytes=700-"]


def test_a_hub_that_sends_nothing_more_is_given_up(hub, cache, monkeypatch):
    waits = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    hub.cuts["m-Q4_K_M.gguf"] = [100] + [0] * 9
    refused("hf:o/gguf", "cannot be reached")
    assert waits == [0, 1, 2, 3, 4]
    hub.cuts.clear()
    hub.sent["m-Q4_K_M.gguf"] = GGUF[:100]  # and no more
    refused("hf:o/gguf", "the Hub sends no more of m-Q4_K_M.gguf")
    assert waits == [0, 1, 2, 3, 4, 1, 2, 3, 4]


# --- faults of the Hub and of the user


def test_wrong_bytes_are_removed(hub, cache):
    for wrong in (GGUF[:-1] + b"?", GGUF + b"?"):
        hub.sent["m-Q4_K_M.gguf"] = wrong
        refused("hf:o/gguf", rf"came with [\d,]+ bytes and checksum {checksum('x.gguf', wrong)[:4]}")
        assert list(cache.glob("models--o--gguf/blobs/*")) == [] == list(cache.rglob("*.gguf"))
    hub.sent["m-Q4_K_M.gguf"] = GGUF + bytes(20_000_000)
    came = re.search(r"came with ([\d,]+) bytes", refused("hf:o/gguf", "it was removed"))
    assert int(came[1].replace(",", "")) < 2_000_000  # it does not wait for the end
    hub.sent["config.json"] = FOLDER["config.json"].replace(b"32", b"64")
    refused("hf:o/folder", "config.json came with")


def test_a_file_in_the_cache_of_another_size_is_named(hub):
    pull("hf:o/gguf").resolve().write_bytes(b"short")
    refused("hf:o/gguf", "has 5 bytes, the Hub announces 204,804: delete it")


def test_bytes_of_another_size_get_no_name(hub, cache):
    """Their checksum is their name, but a copy of the cache may have been cut."""
    blob = cache / "models--o--gguf" / "blobs" / checksum("m.gguf", GGUF)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"short")
    refused("hf:o/gguf", f"{blob} has 5 bytes, the Hub announces 204,804: delete it")
    assert not list(cache.rglob("*.gguf"))
    blob.unlink()
    assert pull("hf:o/gguf").read_bytes() == GGUF


def test_a_gated_repository(hub, monkeypatch):
    hub.token = "hf_secret"
    for name in ("hf:o/gguf", "hf:o/folder"):
        message = refused(
            name, "is gated: accept its licence on http://.*, then set HF_TOKEN, or run `hf auth"
        )
        assert f"{hub.endpoint}/o/" in message
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.requests.clear()
    pull("hf:o/gguf")
    given = {(one.host, one.authorization) for one in hub.requests if "m-Q4_K_M" in one.path}
    assert given == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}  # the token stays with the Hub


def test_a_repository_that_is_not_there(hub):
    refused("hf:o/none", "the Hub has no model o/none, or it is private: check the name, or set HF_TOKEN")


def test_a_file_that_is_not_there(hub):
    refused("hf:o/gguf:Q5_K_M", "hf:o/gguf has no GGUF Q5_K_M; there is: m-Q4_K_M.gguf, m-Q8_0.gguf$")
    refused("hf:o/folder:Q5_K_M", "has no GGUF Q5_K_M; there is: model-00001-of-00002.safetensors")
    del hub.repositories["o/folder"]["model-00002-of-00002.safetensors"]
    refused("hf:o/folder", "index.json names model-00002-of-00002.safetensors, which is not there")
    hub.repositories["o/empty"] = {"README.md": b""}
    refused("hf:o/empty", "has no model that can be fetched; there is: README.md")


@pytest.mark.parametrize(
    "status, headers, words",
    [
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "refuses access \\(401\\)"),
        (403, {}, "refuses access \\(403\\), or the token is wrong"),
        (400, {}, "answers with an error \\(400\\)"),
        (429, {}, "too many requests \\(429\\)"),
        (503, {}, "answers with an error \\(503\\): try again later"),
    ],
)
def test_other_answers(hub, status, headers, words):
    hub.failure = status, headers
    refused("hf:o/gguf", words)


FAILURES = {
    "unreached": (None, "http://127.0.0.1:1 cannot be reached (Connect"),
    "offline": (None, "HF_HUB_OFFLINE forbids to ask the Hub"),
    "503": ((503, {}), "the Hub answers with an error (503)"),
    "429": ((429, {}), "too many requests (429)"),
    "401": ((401, {"X-Error-Message": "Invalid credentials"}), "refuses access (401), or the token is wrong"),
    "403": ((403, {}), "refuses access (403), or the token is wrong: set HF_TOKEN"),
    "private": ((401, {"X-Error-Code": "RepoNotFound"}), "the Hub has no model o/{}, or it is private"),
    "no more": ((404, {"X-Error-Code": "RevisionNotFound"}), "o/{} has no revision main"),
    "page": (b"<html>Log in to the wireless network", "cannot be read (JSONDecodeError"),
}


@pytest.mark.parametrize("failing", FAILURES)
def test_without_the_hub_the_cache_serves(hub, monkeypatch, caplog, failing):
    path, folder = pull("hf:o/gguf"), pull("hf:o/folder")
    answer, problem = FAILURES[failing]
    if failing == "unreached":
        unreachable(monkeypatch)
    elif failing == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif failing == "page":
        hub.answer = answer
    else:
        hub.failure = answer
    for name, found in [("gguf", path), ("folder", folder)]:
        caplog.clear()
        assert pull(f"hf:o/{name}") == found
        notes = remarks(caplog)
        assert len(notes) == (failing != "offline")  # what the user asked for needs no remark
        assert all(problem.format(name) in one and "\n" not in one for one in notes)
        assert all(one.endswith("; what is in the cache is used") for one in notes)
    nothing = "; the cache has no whole copy of it" if failing in ("unreached", "offline") else ""
    refused("hf:o/none", f"{re.escape(problem.format('none'))}.*{nothing}$")
    rest = "; hf:o/gguf in the cache has no GGUF Q8_0; there is: m-Q4_K_M.gguf$"
    refused("hf:o/gguf:Q8_0", f"{re.escape(problem.format('gguf'))}.*{rest}")
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused("hf:o/folder", "; hf:o/folder in the cache: .*names model-00002-of-00002.*, which is not there")


def test_an_update_that_fails_leaves_the_old_model(hub, monkeypatch):
    folder, shard = pull("hf:o/folder"), "model-00002-of-00002.safetensors"
    config = FOLDER["config.json"] + b" "
    hub.commit, hub.repositories["o/folder"] = "1" * 40, FOLDER | {"config.json": config, shard: b"new"}
    hub.sent[shard] = b"old"
    refused("hf:o/folder", "checksum|differs|sha256|SHA-256")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull("hf:o/folder") == folder and (folder / shard).read_bytes() == FOLDER[shard]


@pytest.mark.parametrize(
    "value",
    [
        *("http://[", "nowhere", "", "http://", "ftp://x", "http://127.0.0.1:99999", "http://127.0.0.1:port"),
        *("http://127.0.0.1:0", "http://127.0.0.1:-5", "http://a b", "http://a\x01b", "http://a..b"),
    ],
)
def test_an_endpoint_that_is_no_address(hub, monkeypatch, value):
    monkeypatch.setenv("HF_ENDPOINT", value)
    words = f"HF_ENDPOINT is {value!a}, wanted the address of a Hub, such as https://huggingface.co"
    refused("hf:o/gguf", f"^{re.escape(words)}$")


def test_a_full_disk(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused("hf:o/gguf", "needs 204,804 more bytes, .* has 1,000 left; HF_HOME can name", ResourceLimitError)
    assert hub.contents() == []
    monkeypatch.undo()


def test_a_disk_that_becomes_full(hub, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(client, "sync", full)
    refused("hf:o/gguf", "the disk is full; what was fetched is kept", ResourceLimitError)


def test_a_cache_that_cannot_be_written(hub, cache):
    cache.write_text("a file")
    refused("hf:o/gguf", "cannot be kept in the cache: .*Not a directory.*; HF_HOME can name another folder")


def test_a_cache_that_cannot_be_looked_at(hub, monkeypatch):
    hub.repositories["o/m"] = {"x" * 300 + ".gguf": b"x"}
    refused("hf:o/m", "cannot be kept in the cache: .*File name too long.*; HF_HOME can name another folder")
    stat, hidden = os.stat, "/refs/"

    def denied(path, **options):
        if hidden in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr("os.stat", denied)
    assert locate("hf:o/folder", wanted="tokenizer").is_dir()
    hidden = "/snapshots/"
    refused("hf:o/folder", "cannot be kept in the cache: .*denied.*; HF_HOME can name another folder")


def test_a_whole_model_in_a_cache_that_cannot_be_written(hub, cache, monkeypatch):
    path, refs = pull("hf:o/gguf"), cache / "models--o--gguf" / "refs"
    before = written(refs / "main")
    assert pull("hf:o/gguf") == path and written(refs / "main") == before
    shutil.rmtree(refs)
    refs.write_bytes(b"no folder")
    assert pull("hf:o/gguf") == path
    refs.unlink()
    refs.mkdir()
    (refs / "main").write_bytes(b"\xff")
    hub.failure = 503, {}
    refused("hf:o/gguf", "error \\(503\\)")


def test_without_the_library(hub, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    refused("hf:o/gguf", 'need huggingface_hub: pip install "numpy_llama\\[hub\\]"', UnsupportedError)


# --- what is no model, and what means harm


def test_an_adapter_is_no_model_and_the_way_out_is_named(hub):
    hub.repositories["o/lora"] = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}
    hub.about["o/lora"] = {"cardData": {"base_model": "meta-llama/Llama-2-7b"}}
    with pytest.raises(UnsupportedError, match=r"hf:o/lora is an adapter \(LoRA\): name its base") as caught:
        locate("hf:o/lora")
    assert "the model meta-llama/Llama-2-7b, with -m, and this with --adapter" in str(caught.value)
    assert hub.contents() == []


@pytest.mark.parametrize(
    "files, words",
    [
        ({"model_index.json": b"{}", "unet/config.json": b"{}"}, "a diffusion model"),
        ({"onnx/model.onnx": b"x", "config.json": b"{}"}, "an ONNX export"),
        ({"tf_model.h5": b"x", "config.json": b"{}"}, "weights of TensorFlow"),
        ({"Llama.mlpackage/Data/weight.bin": b"x"}, "a CoreML model"),
    ],
)
def test_a_repository_of_another_kind(hub, files, words):
    hub.repositories["o/other"] = files
    refused("hf:o/other", f"hf:o/other holds {words}", UnsupportedError)
    assert hub.contents() == []


def test_the_hub_knows_the_architecture_of_a_gguf(hub):
    hub.about["o/gguf"] = {"gguf": {"architecture": "gemma3"}}
    refused("hf:o/gguf", "hf:o/gguf: the architecture is 'gemma3', a Gemma", UnsupportedError)
    assert hub.contents() == []


@pytest.mark.parametrize(
    "name",
    [
        *(
            "hf:",
            "hf:x",
            "hf:../..",
            "hf:a/b/c",
            "hf:a b/c",
            "hf:a/b:",
            "hf:a/b@",
            "hf:a/b@/x",
            "hf:a/b@x//y",
            "hf:/a/b",
            "hf:a/b:/etc/x",
        ),
        *(
            "hf:a/b:../x.gguf",
            "hf:a/b:x/../y.gguf",
            "hf:a/b@../x",
            "hf:a/..",
            "hf:.a/b",
            "hf:a/b.git",
            "hf:a--b/c",
        ),
        *("hf:a/b\n", "hf:a/b\0", "hf:a/b:x y", "hf:ä/b", "hf:a/b?x=1", "hf:a/b#c", "hf:" + "a" * 97 + "/b"),
    ],
)
def test_names_that_are_none(name):
    refused(name, "is no name of a model of the Hub, wanted hf:OWNER/REPO", ParameterError)


@pytest.mark.parametrize(
    "name",
    [
        *("../../x.gguf", "/etc/x.gguf", "a/../b.gguf", "a\\b.gguf", "a\nb.gguf", "./x.gguf"),
        *("c:x.gguf", "nul.gguf", "AUX.Q8_0.gguf", "com1/x.gguf", "a./x.gguf"),  # special on Windows
    ],
)
def test_file_names_that_leave_the_cache(hub, cache, name):
    hub.repositories["o/m"] = {name: b"x"}
    refused("hf:o/m", "is no plain file name")
    index = {"weight_map": {"a": name}}
    hub.repositories["o/folder"] |= {"model.safetensors.index.json": as_json(index), name: b"x"}
    refused("hf:o/folder", "is no plain file name|several models")
    assert not list(cache.rglob("x.gguf"))


def test_an_enormous_index_is_not_fetched(hub):
    hub.announced["model.safetensors.index.json"] = {"size": 1 << 30}
    refused("hf:o/folder", "index.json has 1,073,741,824 bytes, at most 1,048,576 are read")
    hub.announced = {"tokenizer.json": {"size": 1 << 40}}
    refused("hf:o/folder", "tokenizer.json has 1,099,511,627,776 bytes, at most 33,554,432 are read")
    assert "tokenizer.json" not in hub.contents()
    hub.announced = {"chat_template.jinja": {"size": 10}}  # and more is sent
    refused("hf:o/folder", "chat_template.jinja came with")


@pytest.mark.parametrize(
    "change",
    [{"size": None}, {"size": -1}, {"size": "9"}, {"lfs": {"size": 1, "sha256": "../x", "pointerSize": 1}}],
)
def test_what_is_announced_wrongly(hub, change):
    hub.announced["m-Q4_K_M.gguf"] = change
    refused("hf:o/gguf", "the Hub announces m-Q4_K_M.gguf with")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"no JSON",
        b"[]",
        b"{}",
        b'{"id": 3}',
        b'{"id": "o/gguf", "sha": "main"}',
        b'{"id": "x", "siblings": 3}',
        b'{"id": "x", "sha": "%s", "siblings": [{"rfilename": null}]}' % COMMIT.encode(),
        b'{"id": "x", "sha": "%s", "siblings": [{"rfilename": 5}]}' % COMMIT.encode(),
        b"[" * 100_000,
    ],
)
def test_answers_that_cannot_be_read(hub, answer):
    hub.answer = answer
    refused("hf:o/gguf", "the answer of http.* cannot be read|the Hub names (the commit|a file)")


@pytest.mark.parametrize(
    "where", ["file:///etc/passwd", "ftp://x/y", "/o/gguf/resolve/main/m-Q4_K_M.gguf", "http://["]
)
def test_redirects_that_lead_nowhere(hub, monkeypatch, where):
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    hub.redirect = where
    refused("hf:o/gguf", "cannot be reached")
