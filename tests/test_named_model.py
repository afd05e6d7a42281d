"""Models by their names: own checkpoints, folders, what is not there, what does not fit."""

import pytest
import torch

pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")
import tiny_hf
import tiny_run

from nanochat.chat_format import ChatFormat
from nanochat.hf import named_model
from nanochat.hf.chat import Template

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_hf.save(tiny_hf.make("qwen3", head_dim=16), tmp_path_factory.mktemp("made") / "tiny-qwen")


def test_own_checkpoints_and_folders(module_trained, folder, capsys):
    assert named_model.own_checkpoints() == ["base/d2", "mid/d2"]
    models = named_model.find_all(["base/d2", "mid", str(folder), "base/d2"], CPU)
    assert [model.name for model in models] == ["base/d2", "mid/d2", "tiny-qwen"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "step 000008" in lines[0] and "GB are free" in lines[2]
    for model in models:
        engine, form = model.load(CPU, 2)
        assert type(form) is (ChatFormat if model.own else Template) and engine.max_batch == 2
        assert model.own or model.n_bytes(torch.bfloat16) == 2 * sum(p.numel() for p in engine.model.parameters())
    assert named_model.find("base/d2", 4).folder.name == "step_000004"


def test_what_is_not_there(module_trained, folder):
    wrong = {
        "base/nobody": "no such checkpoint.*here are base/d2",
        "sft": "run python -m scripts.chat_sft first",
        "nobody": "no model 'nobody' here",
        "../etc": "no model",
    }
    for name, words in wrong.items():
        with pytest.raises(ValueError, match=words):
            named_model.find(name)
    with pytest.raises(ValueError, match="steps there are 4, 8"):
        named_model.find("base/d2", 5)
    with pytest.raises(ValueError, match="only those have steps"):
        named_model.find(str(folder), 5)
    with pytest.raises(ValueError, match="same name"):
        named_model.find_all([str(folder), f"{folder}/"], CPU)


def test_what_does_not_fit_is_refused_before_it_is_loaded(module_trained, folder, monkeypatch):
    size = named_model.find(str(folder)).n_bytes(torch.float32)
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    monkeypatch.setattr(named_model, "free_memory", lambda device: size + 10)
    assert named_model.find_all([str(folder)], CPU)
    with pytest.raises(ValueError, match=r"tiny-qwen, base/d2: .* GB are needed and .* GB are free: take"):
        named_model.find_all([str(folder), "base/d2"], CPU)
    with pytest.raises(ValueError, match=r"tiny-qwen: .* take smaller"):
        monkeypatch.setattr(named_model, "free_memory", lambda device: size - 1)
        named_model.find_all([str(folder)], CPU)


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
