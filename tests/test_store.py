"""Models by their names: downloads from a local hub, folders, own checkpoints, and the verbs of `scripts.models`."""

import functools
import io
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

import nanochat.hf
from nanochat.compute import Compute
from nanochat.conversation import ChatFormat, TextFormat
from nanochat.engine import Engine
from nanochat.hf import download, store
from nanochat.hf.chat import TemplateFormat
from nanochat.hf.tokenizer import HFTokenizer
from scripts import models
from scripts.chat_cli import Chat, Config

ROOT = Path(__file__).resolve().parent.parent
NAME = "me/tiny"
CPU = torch.device("cpu")
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
    with HubServer(NAME, kind="models") as server:
        server.files = dict(files)
        server.use(monkeypatch, tmp_path / "cache")
        yield server


def fetched(server):
    return [path for path, _ in server.requests]


def a_shard(server):
    return max(name for name in server.files if name.startswith("model-"))


def test_download_fetches_what_is_needed_and_verifies(server, files):
    folder = download.download(NAME)
    wanted = {name for name in files if "/" not in name and name not in ("pytorch_model.bin", "README.md")}
    assert {path.name for path in folder.iterdir()} == wanted
    assert all((folder / name).read_bytes() == files[name] for name in wanted)
    assert store.list_models() == {NAME: folder}
    assert download.verify(NAME) == len(wanted)
    model, _ = nanochat.hf.load(store.find("tiny").folder, "cpu", torch.float32)
    facts = store.info(folder)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["architecture"] == "qwen3" and facts["context"] == 256 and facts["commit"] == "0" * 40
    count = len(fetched(server))
    download.download(NAME)
    assert len(fetched(server)) == count, "what is here is kept"


def test_what_transformers_has_downloaded_is_found(server):
    """The same cache: `from_pretrained` fills it, and this project reads it, without a network."""
    import transformers

    transformers.AutoTokenizer.from_pretrained(NAME)
    transformers.AutoModelForCausalLM.from_pretrained(NAME)
    server.requests.clear()
    assert list(store.list_models()) == [NAME]
    store.find(NAME).load(CPU, 1)
    assert fetched(server) == []


def test_a_page_is_a_name(server):
    assert download.download(f"{server.url}/{NAME}") == store.find(f"https://huggingface.co/{NAME}").folder
    assert store.find(f"https://huggingface.co/{NAME}/tree/{'0' * 40}").folder == store.find(NAME).folder


HUB = "https://huggingface.co"
PAGES = {
    f"{HUB}/a/b": ("a/b", "main"),
    f"  {HUB}/a/b/\n": ("a/b", "main"),
    f"{HUB}/a/b?library=transformers#usage": ("a/b", "main"),
    f"{HUB}/a/b.git": ("a/b", "main"),
    f"{HUB}/a/b/tree/main": ("a/b", "main"),
    f"{HUB}/a/b/tree/main/": ("a/b", "main"),
    f"{HUB}/a/b/tree/v2/original?x=1": ("a/b", "v2"),
    f"{HUB}/a/b/tree/refs%2Fpr%2F1": ("a/b", "refs/pr/1"),
    f"{HUB}/a/b/blob/v2/config.json": ("a/b", "v2"),
    f"{HUB}/a/b/resolve/v2/model.safetensors?download=true": ("a/b", "v2"),
    f"{HUB}/a/b/raw/main/config.json": ("a/b", "main"),
    f"{HUB}/a/b/commit/0123456": ("a/b", "0123456"),
    f"{HUB}/a/b/discussions/3": ("a/b", "main"),
    f"{HUB}/gpt2": ("gpt2", "main"),
    f"{HUB}/gpt2/tree/v2": ("gpt2", "v2"),
    "http://www.huggingface.co/a/b": ("a/b", "main"),
    "HTTPS://HuggingFace.co/a/b": ("a/b", "main"),
    "huggingface.co/a/b/tree/v2": ("a/b", "v2"),
    "hf.co/a/b": ("a/b", "main"),
    "a/b": ("a/b", "main"),
    "a/b@v2": ("a/b", "v2"),
}
NO_PAGES = [
    "https://hub.example/a/b",
    "https://huggingface.co.evil.example/a/b",
    "https://huggingface.co@evil.example/a/b",
    "https://evil.example/huggingface.co/a/b",
    "ftp://huggingface.co/a/b",
    "file:///huggingface.co/a/b",
    "https:///a/b",
    "https://[/a/b",
    HUB,
    f"{HUB}/datasets/a/b",
    f"{HUB}/spaces/a/b",
    f"{HUB}/models?search=x",
]


@pytest.mark.parametrize("page", PAGES)
def test_addresses_of_a_models_pages(page):
    assert store.parse_name(page) == PAGES[page]


@pytest.mark.parametrize("page", NO_PAGES)
def test_other_addresses_are_refused_before_anything_is_asked(page):
    for ask in (store.find, download.download, download.remove):
        with pytest.raises(ValueError) as caught:
            ask(page)
        assert "\n" not in str(caught.value)


def test_include(server):
    folder = download.download(NAME, include=["*.md", "original/*"])
    assert sorted(fetched(server)) == ["README.md", "original/model.safetensors"]
    assert (folder / "original" / "model.safetensors").is_file()
    assert store.list_models() == {}, "it cannot be run"
    with pytest.raises(ValueError, match="no file that matches"):
        download.download(NAME, include=["*.gguf"])


@pytest.mark.parametrize("gone", ["config.json", "tokenizer.json", "model-"])
def test_what_cannot_be_run_is_refused_before_it_is_fetched(server, gone):
    server.files = {name: data for name, data in server.files.items() if not name.startswith(gone)}
    with pytest.raises(ValueError, match="lacks"):
        download.download(NAME)
    assert fetched(server) == []


def test_wrong_bytes_of_the_right_length_are_found_and_fetched_again(server):
    server.faults[a_shard(server)] = [("body", bytes(len(server.files[a_shard(server)])))]
    with pytest.raises(ValueError, match=f"damaged, and deleted: {a_shard(server)}"):
        download.download(NAME)
    assert store.list_models() == {}
    download.download(NAME)
    assert download.verify(NAME)


def test_an_interrupted_download_keeps_the_files_that_are_whole(server, monkeypatch):
    monkeypatch.setattr("nanochat.hub.time.sleep", lambda seconds: None)
    server.faults[a_shard(server)] = [("status", 500)] * 4
    with pytest.raises(ConnectionError, match="500"):
        download.download(NAME, workers=1)
    assert store.list_models() == {}
    before = set(fetched(server))
    server.requests.clear()
    download.download(NAME)
    assert a_shard(server) in fetched(server) and len(before & set(fetched(server))) == 1
    assert download.verify(NAME)


def test_revisions_live_side_by_side(server):
    first = download.download(NAME)
    server.commit = "1" * 40
    server.files["config.json"] = first.joinpath("config.json").read_bytes().replace(b"256", b"512")
    server.requests.clear()
    second = download.download(NAME)
    assert fetched(server) == ["config.json"], "by hash, the other files are the same"
    assert store.find(NAME).folder == second
    assert store.find(f"{NAME}@{'0' * 40}").folder == first
    assert store.info(second)["context"] == 512 and store.info(first)["context"] == 256


def test_offline(server):
    with pytest.raises(ValueError, match="without --offline"):
        download.download(NAME, offline=True)
    folder = download.download(NAME)
    server.requests.clear()
    assert download.download(NAME, offline=True) == folder
    assert fetched(server) == []
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="not wholly"):
        download.download(NAME, offline=True)


def test_room_is_checked_first(server, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ValueError, match="make room"):
        download.download(NAME)
    assert fetched(server) == []


@pytest.mark.parametrize("path", ["../evil.safetensors", "/tmp/evil.safetensors", "a/../../evil.safetensors"])
def test_a_listing_that_leads_out_of_the_folder(server, tmp_path, path):
    server.files[path] = b"evil"
    with pytest.raises(ValueError):
        download.download(NAME, include=["*"])
    assert not list(tmp_path.rglob("*evil*")) and not Path("/tmp/evil.safetensors").exists()


def test_verify_and_remove(server):
    folder = download.download(NAME)
    shard = folder / a_shard(server)
    shard.resolve().write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ValueError, match=f"damaged, and deleted: {shard.name}"):
        download.verify(NAME)
    download.download(NAME)
    assert download.verify(NAME)
    assert download.remove(NAME) > 100_000
    assert not folder.exists() and store.list_models() == {}
    with pytest.raises(ValueError, match="not here"):
        download.remove(NAME)
    with pytest.raises(ValueError, match="no model 'nothing'"):
        store.find("nothing")


def test_other_models_and_damaged_ones_in_the_cache_are_left_alone(server, tmp_path):
    folder = download.download(NAME)
    damaged = {
        "bert": ("config.json", '{"model_type": "bert"}'),
        "bad": ("config.json", "{"),
        "index": ("model.safetensors.index.json", '{"weight_map": [1]}'),
        "escape": ("model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}'),
    }
    for name, (file, text) in damaged.items():
        other = tmp_path / "cache" / f"models--me--{name}"
        shutil.copytree(folder, other / "snapshots" / "abc")
        (other / "snapshots" / "abc" / file).write_text(text)
        (other / "refs").mkdir()
        (other / "refs" / "main").write_text("abc")
    assert list(store.list_models()) == [NAME]


def test_models_of_earlier_versions_are_found_and_can_be_removed(server, files):
    """They lie in a folder of their own below the base directory."""
    folder = Path(os.environ["NANOCHAT_BASE_DIR"]) / "hub" / "me--old"
    folder.mkdir(parents=True)
    for name, data in files.items():
        if "/" not in name:
            (folder / name).write_bytes(data)
    assert store.find("me/old").folder == folder
    with pytest.raises(ValueError, match="download it again"):
        download.verify("me/old")
    assert download.remove("me/old") > 100_000
    assert store.list_models() == {}
    for name in ("..", "", "../.."):
        with pytest.raises(ValueError, match="not here"):
            download.remove(name)
    assert folder.parent.is_dir(), "no name leads out of the folder"


def session(folder, **settings):
    model, tokenizer = nanochat.hf.load(folder, "cpu", torch.float32)
    engine = Engine(model, tokenizer, 1)
    return Chat(engine, TemplateFormat(TEMPLATE, tokenizer), Config(**settings), Compute(CPU, torch.float32))


def said(chat):
    return ["".join(part["text"] for part in m["content"]) for m in chat.messages if m["role"] == "assistant"]


def test_a_chat_of_several_turns(server, capsys):
    chat = session(download.download(NAME), temperature=0.0, max_tokens=8)
    for text in ("Hello", "and again"):
        chat.ask(text)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    out, err = capsys.readouterr()
    assert out == "".join(f"{each}\n" for each in said(chat))
    assert err.count("tokens/s") == 2
    for _ in range(12):  # far more than the context holds
        chat.ask("word " * 20)
    assert len(chat.messages) == 28
    chat.ask("word " * 400 + "end")  # of which the end is asked
    request = chat.request(chat.messages[:-1])
    assert len(request.tokens) <= 248 and chat.engine.tokenizer.decode(request.tokens).endswith("word end<|im_end|>")


def test_an_answer_ends_at_the_models_own_mark(server):
    folder = download.download(NAME)
    chat = session(folder, temperature=0.0, max_tokens=40)
    chat.ask("Hello")
    free = chat.engine.complete([chat.form.encode([{"role": "user", "content": "Hello"}])], 40)[0]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[5], 319]}))
    chat = session(folder, temperature=0.0, max_tokens=40)
    assert HFTokenizer.from_directory(folder).stop_tokens >= {free[5]}
    chat.ask("Hello")
    stopped = free[: free.index(free[5])]
    assert said(chat)[-1] == chat.engine.tokenizer.decode_bytes(
        [i for i in stopped if i not in chat.engine.tokenizer.special_tokens.values()]
    ).decode(errors="replace")


def test_prompts_one_after_another_leave_memory_flat(server):
    chat = session(download.download(NAME), temperature=0.0, max_tokens=4)

    def resident():
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4  # kB

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
    assert "qwen3" in run("list").out
    assert "name a model: me/tiny" in script("play").error_line
    assert json.loads(run("info", "tiny").out)["context"] == 256
    assert "as they were" in run("verify", NAME).out
    assert "here are me/tiny" in script("info", "nobody").error_line
    assert "ORG/NAME" in script("download", "no/bo/dy").error_line
    assert "404" in script("download", "no/body").error_line
    assert "deleted" in run("remove", NAME).out
    assert "no model" in script("verify", NAME).error_line


class Typed(io.StringIO):
    """A terminal at which somebody types."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("typed", "chosen"),
    [("2\n", "mid/d2"), ("x\n0\n4\n-1\n\n ² \n 3 \n", "me/tiny"), ("base/d2\n", "base/d2"), ("", None)],
)
def test_play_chooses_by_number(module_trained, server, monkeypatch, capsys, typed, chosen):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(module_trained))
    download.download(NAME)
    monkeypatch.setattr(sys, "stdin", Typed(typed))
    assert models.choose() == chosen
    out = capsys.readouterr().out
    assert "1  base/d2" in out and "2  mid/d2" in out and "3  me/tiny  qwen3" in out


def test_play_from_a_pipe(server):
    download.download(NAME)
    command = [sys.executable, "-m", "scripts.models", "play", "tiny", "--max-tokens", "5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NANOCHAT_DTYPE": "float32"}
    result = subprocess.run(
        command, input="Hello\n/clear\n\nHi\n/exit\nnever\n", env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "GB of weights in float32 for cpu" in result.stderr
    assert result.stderr.count("tokens/s") == 2
    assert result.stdout.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_hf.save(tiny_hf.make("qwen3", head_dim=16), tmp_path_factory.mktemp("made") / "tiny-qwen")


def test_own_checkpoints_and_folders(module_trained, folder):
    assert store.own_checkpoints() == ["base/d2", "mid/d2"]
    models = store.find_all(["base/d2", "mid", str(folder), "base/d2"], CPU)
    assert [model.name for model in models] == ["base/d2", "mid/d2", "tiny-qwen"]
    lines = [model.placement for model in models]
    assert len(lines) == 3 and "step 000008" in lines[0] and "GB are free" in lines[2]
    for model, form_class in zip(models, (TextFormat, ChatFormat, TextFormat), strict=True):
        engine, form = model.load(CPU, 2)
        assert type(form) is form_class and engine.max_batch == 2
    assert store.find("base/d2", 4).folder.name == "step_000004"
    weights = nanochat.hf.load_model(folder, CPU)
    assert models[2].n_bytes(torch.bfloat16) == 2 * sum(p.numel() for p in weights.parameters())


def test_what_is_not_there(module_trained, folder):
    wrong = {
        "base/nobody": "no such checkpoint.*here are base/d2",
        "sft": "run python -m scripts.chat_sft first",
        "nobody": "no model 'nobody' here",
        "../etc": "no model",
    }
    for name, words in wrong.items():
        with pytest.raises(ValueError, match=words):
            store.find(name)
    with pytest.raises(ValueError, match="steps there are 4, 8"):
        store.find("base/d2", 5)
    with pytest.raises(ValueError, match="only those have steps"):
        store.find(str(folder), 5)
    with pytest.raises(ValueError, match="same name"):
        store.find_all([str(folder), f"{folder}/"], CPU)


def test_what_does_not_fit_is_refused_before_it_is_loaded(module_trained, folder, monkeypatch):
    size = store.find(str(folder)).n_bytes(torch.float32)
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    monkeypatch.setattr(store, "free_memory", lambda device: size + 10)
    assert store.find_all([str(folder)], CPU)
    with pytest.raises(ValueError, match=r"tiny-qwen, base/d2: .* GB are needed and .* GB are free: take"):
        store.find_all([str(folder), "base/d2"], CPU)
    with pytest.raises(ValueError, match=r"tiny-qwen: .* take smaller"):
        monkeypatch.setattr(store, "free_memory", lambda device: size - 1)
        store.find_all([str(folder)], CPU)


def test_the_server_script_serves_several(module_trained, folder):
    """As a user starts it: an own checkpoint and a folder; the page's list has both."""
    import http.client
    import json
    import time

    flags = ["--model", "mid", "--model", str(folder), "--port", "0", "--device-type", "cpu"]
    running = tiny_run.start_script("scripts.chat_web", *flags)
    try:
        deadline = time.time() + 120
        while "chat at http://" not in running.written() and time.time() < deadline and running.process.is_alive():
            time.sleep(0.1)
        address = running.written().split("http://")[1].split()[0]
        connection = http.client.HTTPConnection(address, timeout=60)
        connection.request("GET", "/v1/models")
        names = [model["id"] for model in json.loads(connection.getresponse().read())["data"]]
        assert names == ["mid/d2", "tiny-qwen"]
        for name in names:
            body = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            assert json.loads(connection.getresponse().read())["model"] == name
    finally:
        running.process.terminate()
        assert running.wait().code == 0
