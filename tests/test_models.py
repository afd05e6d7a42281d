"""`scripts.models`: models from a local hub that misbehaves, what is on disk, and a chat with it."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import torch

pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")
import tiny_hf
from hub_server import HubServer

from nanochat.engine import Engine
from nanochat.hf import load as hf_load
from nanochat.hf import store as model_store
from nanochat.hf.chat import Template
from nanochat.hf.tokenizer import HFTokenizer
from nanochat.terminal import Chat, Config

ROOT = Path(__file__).resolve().parent.parent
FAST = {"timeout": 5.0, "backoff": 0.01}
NAME = "me/tiny"
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A sharded model's files, among others that are not needed."""
    folder = tiny_hf.save(tiny_hf.make("qwen3", head_dim=16), tmp_path_factory.mktemp("made"), max_shard_size="100KB")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    others = {"original/model.safetensors": b"x" * 100, "pytorch_model.bin": b"y" * 100, "README.md": b"# hi"}
    return {path.name: path.read_bytes() for path in folder.iterdir()} | others


@pytest.fixture
def server(files, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer(NAME, kind="models") as server:
        server.files = dict(files)
        monkeypatch.setenv("NANOCHAT_HUB", server.url)
        yield server


def fetched(server):
    return [path for path, _ in server.requests if not path.startswith("/api")]


def test_download_fetches_what_is_needed_and_verifies(server, files):
    folder = model_store.download(NAME, **FAST)
    wanted = {name for name in files if "/" not in name and name not in ("pytorch_model.bin", "README.md")}
    assert {path.name for path in folder.iterdir()} == {*wanted, "nanochat_hub.json"}
    assert all((folder / name).read_bytes() == files[name] for name in wanted)
    assert model_store.list_models() == [NAME]
    assert model_store.verify(NAME) == len(wanted)
    model, _ = hf_load.load(model_store.find("tiny"), "cpu", torch.float32)
    facts = model_store.info(folder)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["architecture"] == "qwen3" and facts["context"] == 256 and facts["commit"] == "0" * 40
    count = len(fetched(server))
    model_store.download(NAME, **FAST)
    assert len(fetched(server)) == count, "what is here is kept"


def test_include(server):
    folder = model_store.download(NAME, include=["*.md", "original/*"], **FAST)
    assert sorted(fetched(server)) == ["README.md", "original/model.safetensors"]
    assert (folder / "original" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="no file that matches"):
        model_store.download(NAME, include=["*.gguf"], **FAST)


def test_a_hub_that_misbehaves_for_a_while(server):
    shards = [name for name in server.files if name.startswith("model-")]
    server.faults[shards[0]] = [("truncate", 5000), ("status", 500), ("stall", 1.0, 10), ("body", b"lies")]
    server.faults[shards[1]] = [("status", 429), ("no_range",), ("truncate", 0)]
    server.faults["config.json"] = [("status", 503), ("truncate", 3)]
    model_store.download(NAME, timeout=0.4, backoff=0.01)
    assert model_store.verify(NAME)


@pytest.mark.parametrize("lie", ["hash", "length", "short listing"])
def test_a_hub_that_keeps_lying_ends_in_one_line(server, lie):
    shard = max(name for name in server.files if name.startswith("model-"))
    if lie == "hash":
        server.faults[shard] = [("body", bytes(len(server.files[shard])))] * 9
    else:
        server.sizes[shard] = len(server.files[shard]) + (100 if lie == "length" else -100)
    with pytest.raises(ConnectionError, match=shard):
        model_store.download(NAME, retries=2, **FAST)
    folder = model_store.model_dir(NAME)
    assert not (folder / shard).exists() and not (folder / "nanochat_hub.json").exists()
    assert model_store.list_models() == []
    server.faults.clear(), server.sizes.clear()
    model_store.download(NAME, **FAST)
    assert model_store.verify(NAME)


def test_token_goes_to_the_hub_and_nowhere_else(server, files, monkeypatch):
    """Every file is sent on to another host, which must not see the token."""
    server.token = "secret"
    with pytest.raises(ValueError, match="set HF_TOKEN"):
        model_store.download(NAME, **FAST)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ValueError, match="is your HF_TOKEN right"):
        model_store.download(NAME, **FAST)
    monkeypatch.setenv("HF_TOKEN", "secret")
    with HubServer(NAME, kind="models") as cdn:
        cdn.files, server.cdn = dict(files), cdn
        model_store.download(NAME, **FAST)
        assert model_store.verify(NAME)
        assert cdn.tokens and set(cdn.tokens) == {None}


def test_second_run_continues(server):
    shard = max((name for name in server.files if name.startswith("model-")), key=lambda n: len(server.files[n]))
    part = model_store.model_dir(NAME) / f"{shard}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(server.files[shard][:5000])
    model_store.download(NAME, **FAST)
    assert (shard, "bytes=5000-") in server.requests
    assert model_store.verify(NAME)


def test_another_commit_replaces_what_changed(server):
    folder = model_store.download(NAME, **FAST)
    before = folder.joinpath("config.json").read_bytes()
    server.commit, server.files["config.json"] = "1" * 40, before.replace(b"256", b"512")
    server.requests.clear()
    model_store.download(NAME, **FAST)
    assert folder.joinpath("config.json").read_bytes() != before, "though its size is the same"
    assert not any(path.endswith(".safetensors") for path in fetched(server)), "by hash, these are the same"
    assert model_store.info(folder)["commit"] == "1" * 40


def test_offline(server):
    with pytest.raises(ValueError, match="without --offline"):
        model_store.download(NAME, offline=True)
    folder = model_store.download(NAME, **FAST)
    server.requests.clear()
    assert model_store.download(NAME, offline=True) == folder
    assert server.requests == []
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="not wholly here"):
        model_store.download(NAME, offline=True)


def test_room_is_checked_first(server, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ValueError, match="make room"):
        model_store.download(NAME, **FAST)
    assert fetched(server) == []


@pytest.mark.parametrize("path", ["../evil.safetensors", "/tmp/evil.safetensors", "a/../../evil.safetensors", "a\\b"])
def test_a_listing_that_leads_out_of_the_folder(server, tmp_path, path):
    server.files[path] = b"evil"
    with pytest.raises(ValueError, match="outside the folder"):
        model_store.download(NAME, include=["*"], **FAST)
    assert not list(tmp_path.rglob("*evil*")) and not Path("/tmp/evil.safetensors").exists()


@pytest.mark.parametrize("size", ["many", None, [3]])
def test_a_listing_that_is_none(server, size):
    server.sizes["config.json"] = size
    with pytest.raises(ValueError):
        model_store.download(NAME, **FAST)


@pytest.mark.parametrize("name", ["tiny", "../x", "a/b/c", "", "a/../b", "me/ti ny", "/etc/passwd"])
def test_names(server, name):
    with pytest.raises(ValueError, match="ORG/NAME"):
        model_store.model_dir(name)


def test_verify_and_remove(server):
    folder = model_store.download(NAME, **FAST)
    shard = max(folder.glob("model-*"))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ValueError, match=f"damaged, and deleted: {shard.name}"):
        model_store.verify(NAME)
    model_store.download(NAME, **FAST)
    assert model_store.verify(NAME)
    assert model_store.remove(NAME) > 100_000
    assert not folder.exists() and model_store.list_models() == []
    with pytest.raises(ValueError, match="not here"):
        model_store.remove(NAME)
    with pytest.raises(ValueError, match="no model 'nothing'"):
        model_store.find("nothing")


def session(folder, **settings):
    model, tokenizer = hf_load.load(folder, "cpu", torch.float32)
    shown, form = [], Template(TEMPLATE, tokenizer)
    return Chat(Engine(model, tokenizer, 1), form, Config(**settings), lambda *each: shown.append(each)), shown


def said(chat):
    return ["".join(part["text"] for part in m["content"]) for m in chat.messages if m["role"] == "assistant"]


def test_a_chat_of_several_turns(server):
    chat, shown = session(model_store.download(NAME, **FAST), temperature=0.0, max_tokens=8)
    for text in ("Hello", "and again"):
        chat.ask(text)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert "".join(text for text, aside in shown if not aside) == "".join(f"{each}\n" for each in said(chat))
    assert sum("tokens/s" in text for text, aside in shown if aside) == 2
    for _ in range(12):  # far more than the context holds
        chat.ask("word " * 20)
    assert len(chat.messages) == 28
    chat.ask("word " * 400 + "end")  # of which the end is asked
    request = chat.config.request(chat.form, chat.messages[:-1], 256)
    assert len(request.tokens) <= 248 and chat.engine.tokenizer.decode(request.tokens).endswith("word end<|im_end|>")


def test_an_answer_ends_at_the_models_own_mark(server):
    folder = model_store.download(NAME, **FAST)
    chat, _ = session(folder, temperature=0.0, max_tokens=40)
    chat.ask("Hello")
    free = chat.engine.complete([chat.form.render([{"role": "user", "content": "Hello"}])], 40)[0]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[5], 319]}))
    chat, _ = session(folder, temperature=0.0, max_tokens=40)
    assert HFTokenizer.from_directory(folder).stop_tokens >= {free[5]}
    chat.ask("Hello")
    stopped = free[: free.index(free[5])]
    assert said(chat)[-1] == chat.engine.tokenizer.decode_bytes(
        [i for i in stopped if i not in chat.engine.tokenizer.special_tokens.values()]
    ).decode(errors="replace")


def test_prompts_one_after_another_leave_memory_flat(server):
    chat, _ = session(model_store.download(NAME, **FAST), temperature=0.0, max_tokens=4)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4  # kB

    for _ in range(10):
        chat.ask("again")
    before = resident()
    for _ in range(100):
        chat.ask("again")
    assert resident() - before < 8_000


def test_command_line(server):
    """Each verb, as a user types it."""
    run, script = (functools.partial(f, "scripts.models") for f in (tiny_run.run, tiny_run.script))
    assert "nothing yet" in run("list").out
    assert NAME in run("download", NAME).out
    assert "qwen3" in run("list").out and "qwen3" in run("play").out
    assert json.loads(run("info", "tiny").out)["context"] == 256
    assert "as they were" in run("verify", NAME).out
    assert "here are me/tiny" in script("play", "nobody").error_line
    assert "ORG/NAME" in script("download", "nobody").error_line
    assert "404" in script("download", "no/body").error_line
    assert "deleted" in run("remove", NAME).out
    assert "not here" in script("verify", NAME).error_line


def test_play_from_a_pipe(server):
    model_store.download(NAME, **FAST)
    command = [sys.executable, "-m", "scripts.models", "play", "tiny", "--max-tokens", "5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NANOCHAT_DTYPE": "float32"}
    result = subprocess.run(
        command, input="Hello\n/clear\n\nHi\n/exit\nnever\n", env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "GB of weights in float32 for cpu" in result.stderr
    assert result.stderr.count("tokens/s") == 2
    assert result.stdout.strip()
