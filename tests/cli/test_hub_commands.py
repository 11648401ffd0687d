"""Models of the Hugging Face Hub on the command line, in a process and an environment of its own."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from helpers.command_line import PROGRAM, assert_refused, run
from helpers.hub import served
from helpers.tiny_models import SPEAKER, write_speaker
from helpers.tokenizers import byte_level_metadata, hugging_face
from helpers.updates import random_updates

from numpy_llama.checkpoint.adapters import write_peft
from numpy_llama.checkpoint.download import MODELS
from numpy_llama.checkpoint.repositories import REPOSITORIES

BIG = b"GGUF" + bytes(300_000)


@pytest.fixture
def hub(tmp_path):
    with served() as hub:
        speaker = write_speaker(tmp_path / "m.gguf").read_bytes()
        hub.repositories["o/m"] = {"m-Q4_K_M.gguf": speaker, "m-F32.gguf": speaker, "README.md": b""}
        hub.repositories["o/big"] = {"m.gguf": BIG}
        yield hub


@pytest.fixture
def environment(hub, tmp_path):
    """The variables of huggingface_hub: this Hub, a home as no shell has expanded it, no token, patience."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    patience = {"HF_HUB_ETAG_TIMEOUT": "300", "HF_HUB_DOWNLOAD_TIMEOUT": "300"}
    return kept | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": "~/hf", "HOME": str(tmp_path)} | patience


def test_generate_fetches_and_runs(hub, environment, tmp_path):
    done = run("generate", "hello", "-n", "3", "-m", "hf:o/m", "--json", env=environment)
    assert done.returncode == 0 and b'"tokens"' in done.stdout
    assert (
        done.stderr == b"numpy-llama: hf:o/m is m-Q4_K_M.gguf\n"
    )  # the choice, and no bar without a terminal
    hub.contents()
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    done = run("tokenize", "hello", "-m", "hf:o/m:q4_k_m", env=offline)
    assert done.returncode == 0 and done.stderr == b"" and hub.contents() == []
    words = "hf:o/m: HF_HUB_OFFLINE forbids to ask the Hub; hf:o/m in the cache has no GGUF F32"
    assert_refused(run("info", "hf:o/m:F32", env=offline), 1, words)
    assert list((tmp_path / "hf" / "hub").rglob("*.gguf"))


def test_tokenize_fetches_no_weights(hub, environment, tmp_path):
    path = tmp_path / "tokenizer.json"
    hugging_face(byte_level_metadata()).save(str(path))
    hub.repositories["o/folder"] = {"tokenizer.json": path.read_bytes(), "model.safetensors": BIG}
    done = run("tokenize", "hello", "-m", "hf:o/folder", env=environment)
    assert done.returncode == 0 and done.stdout and done.stderr == b""
    assert hub.contents() == ["tokenizer.json"]


def test_an_adapter_of_the_hub(hub, environment, tmp_path):
    write_peft(tmp_path / "lora", random_updates(1, {"layers.1.attention.wq.weight": 3}), SPEAKER)
    hub.repositories["o/lora"] = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}
    for command in (
        ["info", "hf:o/lora"],
        ["generate", "x", "-n", "2", "-m", str(tmp_path / "m.gguf"), "--adapter", "hf:o/lora:0.5"],
        ["merge", "-m", "hf:o/m:f32", "--adapter", "hf:o/lora", "--out", str(tmp_path / "merged.gguf")],
    ):
        done = run(*command, env=environment | {"HF_HOME": str(tmp_path / command[0])})
        assert done.returncode == 0, done.stderr
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub.contents())
    words = "hf:o/lora is an adapter (LoRA): name its base with -m, and this with --adapter"
    assert_refused(run("generate", "x", "-m", "hf:o/lora", env=environment), 1, words)


def test_pull_prints_the_path_and_the_token_is_sent(hub, environment):
    hub.token = "hf_secret"
    assert_refused(run("pull", "hf:o/m", env=environment), 1, "is gated: accept its licence", "HF_TOKEN")
    done = run("pull", "hf:o/m:F32", env=environment | {"HF_TOKEN": "hf_secret"})
    assert Path(done.stdout.decode().strip()).read_bytes() == hub.repositories["o/m"]["m-F32.gguf"]
    assert done.returncode == 0 and done.stderr == b""


def test_a_token_that_is_refused_is_a_note_if_the_model_is_there(hub, environment):
    path = run("pull", "hf:o/m:q4_k_m", env=environment).stdout
    hub.failure = 401, {"X-Error-Message": "Invalid credentials in Authorization header"}
    done = run("pull", "hf:o/m:q4_k_m", env=environment | {"HF_TOKEN": "hf_expired"})
    assert done.returncode == 0 and done.stdout == path
    assert done.stderr == (
        b"numpy-llama: hf:o/m: the Hub refuses access (401), or the token is wrong: "
        b"set HF_TOKEN, or run `hf auth login`; what is in the cache is used\n"
    )


def test_ctrl_c_during_a_fetch_and_the_next_one_continues(hub, environment, tmp_path):
    hub.holds["m.gguf"] = 200_000
    process = subprocess.Popen(
        [PROGRAM, "pull", "hf:o/big"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    blobs = tmp_path / "hf" / "hub" / "models--o--big" / "blobs"
    while not any(part.stat().st_size for part in blobs.glob("*.incomplete")):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    note = b"numpy-llama: hf:o/big: what was fetched is kept, and the next fetch continues it\n"
    assert (process.returncode, out, err) == (130, b"", note)
    hub.released.set()
    hub.requests.clear()
    done = run("pull", "hf:o/big", env=environment)
    assert Path(done.stdout.decode().strip()).read_bytes() == BIG
    (begin,) = [one.range for one in hub.requests if one.path.startswith("/cdn/")]
    assert 0 < int(begin.removeprefix("bytes=").removesuffix("-")) <= 200_000


def test_the_list_of_names(environment):
    done = run("pull", env=environment)
    names = [line.split()[0] for line in done.stdout.decode().splitlines()]
    assert done.returncode == 0 and names == [*MODELS, *REPOSITORIES]


@pytest.mark.parametrize(
    "name, code, words",
    [
        ("hf:o/none", 1, "the Hub has no model o/none"),
        ("hf:o/m/x", 2, "wanted hf:OWNER/REPO"),
        ("llama-3.1-8b-instrct", 1, "did you mean llama-3.1-8b-instruct?"),
    ],
)
def test_exit_codes(environment, name, code, words):
    assert_refused(run("pull", name, env=environment), code, words)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:1"}, "HF_ENDPOINT http://127.0.0.1:1 cannot be reached (ConnectE"),
        ({"HF_ENDPOINT": "http://["}, "HF_ENDPOINT is 'http://[', wanted the address of a Hub"),
        (
            {"ALL_PROXY": "foo://x"},
            "look at HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE (ValueError: Unknown sch",
        ),
        ({"HF_HUB_ETAG_TIMEOUT": "soon"}, "look at the variables HF_*"),
        ({"HF_TOKEN": "\u00fc"}, "HF_TOKEN has characters that no token has"),
    ],
)
def test_an_environment_that_is_wrong(environment, change, words):
    assert_refused(run("pull", "hf:o/m", env=environment | change), 1, words)


def test_a_server_that_is_no_hub(hub, environment):
    where = f"HF_ENDPOINT {hub.endpoint}"
    hub.answer = b"<html>"
    assert_refused(run("pull", "hf:o/m", env=environment), 1, f"the answer of {where} cannot be read (JSOND")
    hub.failure = 404, {}
    assert_refused(run("pull", "hf:o/m", env=environment), 1, f"hf:o/m: {where} is no Hub (404)")
