"""Open-weights models on several devices: layers placed one after another, and matrices cut over ranks."""

import sys

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="makes the models; not installed")
import tiny_hf
import tiny_run

from nanochat import hf_load
from nanochat.engine import Engine
from nanochat.hf_parallel import place_layers, split_layers, tensor_parallel

CPU = torch.device("cpu")
IDX = torch.arange(3, 43)[None] * 7 % tiny_hf.VOCAB


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_hf.save(tiny_hf.make("qwen3", head_dim=16), tmp_path_factory.mktemp("qwen3"))


def load(folder):
    return hf_load.load_model(folder, CPU, torch.float32)


def test_devices_are_filled_one_after_another():
    assert split_layers([4, 4, 4, 4], [9, 100]) == [0, 0, 1, 1]
    assert split_layers([4, 4, 4], [3, 5, 8]) == [1, 2, 2]
    assert split_layers([4, 4], [8]) == [0, 0]
    with pytest.raises(ValueError, match="do not fit"):
        split_layers([4, 4, 4], [5, 5])


def test_layers_lie_where_they_are_placed(folder):
    """On two devices, of which the second has no values: what a layer is given is brought to it."""
    meta = torch.device("meta")
    placed = place_layers(load(folder), [CPU, meta], [0, 0, 1])
    assert [next(block.parameters()).device for block in placed.model.layers] == [CPU, CPU, meta]
    assert placed.model.embed_tokens.weight.device == CPU
    logits = placed(IDX)
    assert logits.device == meta and logits.shape == (1, 40, tiny_hf.VOCAB)


def test_placed_layers_give_the_same(folder, tmp_path):
    for each in (folder, tiny_hf.save(tiny_hf.make("gpt_oss"), tmp_path)):
        assert torch.equal(place_layers(load(each), [CPU, CPU], [0, 1, 1])(IDX), load(each)(IDX))


def on_a_rank(rank, folder, store):
    """Logits and greedy tokens of the model cut over two processes are those of the whole."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    whole, cut = load(folder), tensor_parallel(load(folder), mesh)
    assert cut.model.layers[0].self_attn.q_proj.weight.to_local().shape == (32, 64)
    error = (cut(IDX) - whole(IDX)).abs().max() / whole(IDX).abs().max()
    assert error < 1e-4, error
    tokenizer, prompts = hf_load.HFTokenizer.from_directory(folder), [IDX[0, :9].tolist(), IDX[0, :17].tolist()]
    said = [Engine(model, tokenizer, 2).complete(prompts, 20) for model in (whole, cut)]
    assert said[0] == said[1] and len(said[0][0]) == 20
    sys.stdout.write(f"rank {rank}: {error:.1e}\n")
    sys.stdout.flush()
    dist.destroy_process_group()


def test_matrices_cut_over_two_processes(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    running = [tiny_run.start(on_a_rank, rank, str(folder), str(tmp_path / "store")) for rank in range(2)]
    results = [each.wait(300) for each in running]
    assert [result.code for result in results] == [0, 0], results[0].err + results[1].err
    assert all("rank" in result.out for result in results)


def test_what_cannot_be_cut_is_refused(folder, tmp_path):
    class Mesh:
        def __init__(self, n):
            self.n = n

        def size(self):
            return self.n

    with pytest.raises(ValueError, match="3 ranks cannot share 4 heads"):
        tensor_parallel(load(folder), Mesh(3))
    with pytest.raises(ValueError, match="place the layers"):
        tensor_parallel(load(tiny_hf.save(tiny_hf.make("gpt_oss"), tmp_path)), Mesh(2))
