"""Open-weights models on several devices: layers placed one after another, and matrices cut over ranks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="makes the models; not installed")
import tiny_hf
import tiny_run
from far_devices import KIND, FarDevices

from nanochat import hf
from nanochat.engine import Engine, Request
from nanochat.hf import llama as hf_llama
from nanochat.hf import store
from nanochat.hf.parallel import split_layers, tensor_parallel
from nanochat.hf.tokenizer import HFTokenizer

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
IDX = torch.arange(3, 43)[None] * 7 % tiny_hf.VOCAB


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_hf.save(tiny_hf.make("qwen3", head_dim=16), tmp_path_factory.mktemp("qwen3"))


def load(folder):
    return hf.load_model(folder, CPU, torch.float32)


def test_devices_are_filled_one_after_another_to_the_same_share():
    assert split_layers([4, 4, 4, 4], [80, 80]) == [0, 0, 1, 1]
    assert split_layers([4, 4, 4, 4, 4, 4], [8 << 30, 4 << 30]) == [0, 0, 0, 0, 1, 1]
    assert split_layers([4, 4, 4], [3, 5, 8]) == [1, 2, 2]
    assert split_layers([4, 4], [8]) == [0, 0]
    assert split_layers([4, 4, 4, 4], [9, 8]) == [0, 0, 1, 1], "as full as that may be"
    with pytest.raises(ValueError, match="do not fit"):
        split_layers([4, 4, 4], [5, 5])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.lists(st.integers(0, 99), min_size=1, max_size=4))
def test_no_device_is_given_more_than_it_has(sizes, room):
    """Layers stay in order, and whatever fits by filling one device after another is placed."""
    left, device = list(room), 0
    for size in sizes:
        while device < len(left) and left[device] < size:
            device += 1
        if device == len(left):
            with pytest.raises(ValueError):
                split_layers(sizes, room)
            return
        left[device] -= size
    places = split_layers(sizes, room)
    assert places == sorted(places) and len(places) == len(sizes)
    assert all(sum(n for n, place in zip(sizes, places) if place == i) <= free for i, free in enumerate(room))


KINDS = {
    "qwen3": ("qwen3", {"head_dim": 16}),
    "llama3 rope, tied": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "gpt_oss": ("gpt_oss", {}),
}
TWO = [torch.device(KIND, 0), torch.device(KIND, 1)]
PROMPTS = [IDX[0, :n].tolist() for n in (9, 30, 1, 17, 2, 33)]


@pytest.mark.parametrize("kind", KINDS)
def test_placed_layers_say_the_same(kind, tmp_path, monkeypatch):
    """Greedy tokens through the engine, prompts of mixed lengths, some of whose beginnings are known, in fewer slots
    than there are prompts; every tensor of a layer, its cache and its kept prefixes too, stays where the layer is."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    name, shape = KINDS[kind]
    folder = tiny_hf.save(tiny_hf.make(name, **shape), tmp_path / "model")
    engine, _ = store.find(str(folder)).load(CPU, 3)
    wanted = engine.complete(PROMPTS, 10)
    with FarDevices():
        monkeypatch.setattr(store, "free_memory", lambda device: 1 << 30)
        (found,) = store.find_all([str(folder)], CPU, devices=f"{KIND}:0,{KIND}:1")
        assert re.search(r"for lazy:0 \(\d layers\), lazy:1 \(\d layers\), 2.15 GB are free", found.placement)
        assert set(found.places) == set(TWO) and len(found.places) == 3
        engine, _ = found.load(CPU, 3)
        assert (
            engine.model.device == TWO[0]
            and engine.model.lm_head.weight.device == TWO[0 if "tied" in kind or kind == "gpt2" else 1]
        )
        assert engine.complete(PROMPTS, 10) == wanted
        assert engine.scheduler.n_reused, "known beginnings"
        for each in ([layer.memory for layer in engine.cache.layers], engine.cache.prefixes._memory):
            assert [k.device for k, _ in each] == [v.device for _, v in each] == list(found.places)
        assert not engine.model.graphs, "no CUDA graph where a device ends"


def test_what_layers_share_crosses_once(folder, monkeypatch):
    """From the first device to the second, whatever the number of layers there: the residual, cos, sin, positions, and
    rows of the cache."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    with FarDevices() as devices:
        model = hf.load_model(folder, [TWO[0], TWO[1], TWO[1]])
        engine = Engine(model, HFTokenizer.from_directory(folder), 1)
        engine.add(Request(PROMPTS[0], max_tokens=5))
        engine.step()
        devices.crossings.clear()
        engine.step()
        assert devices.crossings == [
            ("lazy:0", "lazy:1", shape) for shape in ((1, 64), (1, 1, 16), (1, 1, 16), (1,), (1,))
        ]


def test_a_missing_transfer_is_found(folder, monkeypatch):
    """The devices of this test would not let one pass."""
    with FarDevices():
        model = hf.load_model(folder, [*TWO, TWO[1]], torch.float32)
        assert model(IDX.to(TWO[0])).device == TWO[1]
        monkeypatch.setattr(hf_llama, "bring", lambda device, *tensors: tensors)
        with pytest.raises(RuntimeError, match="mixes tensors of lazy:0, lazy:1"):
            model(IDX.to(TWO[0]))


def on_a_rank(rank, folder, store):
    """Logits and greedy tokens of the model cut over two processes are those of the whole."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    whole = load(folder)
    cut = tensor_parallel(load(folder), mesh)
    assert cut.layers[0].self_attn.q_proj.weight.to_local().shape == (32, 64)
    error = (cut(IDX) - whole(IDX)).abs().max() / whole(IDX).abs().max()
    assert error < 1e-4, error
    tokenizer = HFTokenizer.from_directory(folder)
    prompts = [IDX[0, :9].tolist(), IDX[0, :17].tolist()]
    said = Engine(cut, tokenizer, 2).complete(prompts, 20)
    assert said == Engine(whole, tokenizer, 2).complete(prompts, 20)
    assert len(said[0]) == 20
    sys.stdout.write(f"rank {rank}: {error:.1e}\n")
    sys.stdout.flush()
    dist.destroy_process_group()


def test_matrices_cut_over_two_processes(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    running = [tiny_run.start(on_a_rank, rank, str(folder), str(tmp_path / "store")) for rank in range(2)]
    results = [each.wait(300) for each in running]
    assert [result.code for result in results] == [0, 0], results[0].err + results[1].err
    assert all("rank" in result.out for result in results)


def play(folder, *start, flags=()):
    """The answers of `models play` to a few lines, as a user starts it, and how it ended."""
    settings = ["--device-type", "cpu", "--max-tokens", "12", *flags]
    command = [sys.executable, *start, "-m", "scripts.models", "play", str(folder), *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NANOCHAT_DTYPE": "float32", "OMP_NUM_THREADS": "1"}
    lines = "Hello\nand you?\n/nonsense\n/exit\nnever read\n"
    return subprocess.run(command, input=lines, env=environment, capture_output=True, text=True, timeout=400)


def test_a_chat_over_two_processes(folder):
    """Rank 0 talks, the other follows: the answers are those of one process, each said once."""
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    alone = play(folder)
    cut = play(folder, "-m", "torch.distributed.run", "--nproc-per-node", "2", flags=["--tensor-parallel"])
    assert (alone.returncode, cut.returncode) == (0, 0), alone.stderr + cut.stderr
    assert cut.stdout == alone.stdout
    assert "unknown command /nonsense" in cut.stdout
    assert cut.stderr.count("tokens/s") == 2
    assert cut.stderr.count("GB of weights") == 1
    assert "torchrun" in play(folder, flags=["--tensor-parallel"]).stderr


def test_what_cannot_be_cut_is_refused(folder, tmp_path):
    class Mesh:
        def __init__(self, n):
            self.n = n

        def size(self):
            return self.n

    with pytest.raises(ValueError, match="3 ranks cannot share 4 heads"):
        tensor_parallel(load(folder), Mesh(3))
    with pytest.raises(ValueError, match="use --devices"):
        tensor_parallel(load(tiny_hf.save(tiny_hf.make("gpt_oss"), tmp_path)), Mesh(2))
