"""Memory, rows and time foretold: against what autograd keeps, what the allocator gives out, and what then runs."""

import os
import re
import socket

import pytest
import torch
from tiny_run import BASE, STEPS, losses, run, run_ranks, script, start
from torch.profiler import ProfilerActivity, profile

from nanochat import preflight, recipe
from nanochat.compute import Compute
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW

LRS = dict.fromkeys(("matrix", "embedding", "unembedding", "scalar"), 0.01)
EAGER = ("blocks", "eager")
SMALL = {"n_layer": 3, "n_head": 3, "n_kv_head": 3, "n_embd": 192, "sequence_len": 256, "window_pattern": "L"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def make(dtype=torch.float32, device="cpu", vocab_size=600, **fields):
    with torch.device(device):
        model = GPT(GPTConfig(**{**SMALL, "vocab_size": vocab_size, **fields}), dtype, torch.float32)
    if device == "cpu":
        model.init_weights(torch.Generator().manual_seed(0))
    return model


def tokens(model, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (rows, model.config.sequence_len), generator=generator)


# --- memory


def kept(model, rows):
    """Bytes of the storages, parameters aside, that autograd saves in one forward pass."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens(model, rows), tokens(model, rows, 1), loss_reduction="sum")
    return sum(nbytes for pointer, (nbytes, _) in saved.items() if pointer not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_kv_head", [1, 3])
def test_what_a_block_keeps(dtype, n_kv_head):
    """Two layers more, one of them with a value embedding, add what two layers keep."""
    few, more = (make(dtype, n_layer=n, n_kv_head=n_kv_head) for n in (4, 6))
    kept(few, 2)  # the first call tries attention out
    expected = sum(preflight.block_bytes(more, layer, 2, "blocks") for layer in (4, 5))
    assert kept(more, 2) - kept(few, 2) == pytest.approx(expected, rel=0.02)


def allocated(run_step):
    """Most bytes that the allocator had given out during a call, beyond those before it; and those at its end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as account:
        run_step()
    events = [e for e in account.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measured_peak(model, rows, accumulation, compute=None):
    """Bytes of parameters and optimizer state, and the most that a step takes beside them."""
    optimizer = MuonAdamW(model, LRS, 0.1, compute or Compute(torch.device("cpu"), model.dtype))

    def step():
        for micro in range(accumulation):
            model(tokens(model, rows, micro), tokens(model, rows, 9), loss_reduction="sum").backward()
        optimizer.step(0, clip=None)

    step()
    held = [*model.parameters(), *optimizer.state_dict().values()]
    return sum(tensor.nbytes for tensor in held) + allocated(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields, rows, accumulation, checkpointing",
    [
        ({}, 3, 1, False),  # blocks weigh most
        ({"n_layer": 5, "sequence_len": 128}, 4, 2, True),
        ({"vocab_size": 9000, "n_layer": 2, "sequence_len": 128}, 1, 2, False),  # tables and the loss's chunk
        ({"n_embd": 384, "n_head": 6, "n_kv_head": 2, "sequence_len": 64}, 1, 1, False),  # the optimizer
        ({"sequence_len": 640, "window_pattern": "SSL", "n_layer": 4}, 2, 1, False),
        ({"sequence_len": 512, "n_layer": 6, "window_pattern": "L"}, 2, 1, True),
    ],
)
def test_the_peak_is_foretold_within_a_tenth(dtype, fields, rows, accumulation, checkpointing):
    model = make(dtype, **fields)
    model.checkpointing = checkpointing
    expected = preflight.peak_bytes(model, rows, EAGER, checkpointing, accumulation)
    assert expected == pytest.approx(measured_peak(model, rows, accumulation), rel=0.1)


WIDE = {"n_layer": 4, "n_embd": 320, "n_head": 5, "n_kv_head": 5, "sequence_len": 64}


def peak_of_a_rank():
    compute, model = Compute.create("cpu"), make(**WIDE)
    print("peak", measured_peak(model, 1, 1, compute))
    compute.close()


def test_the_peak_of_two_ranks(session_world, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(session_world))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    expected = preflight.peak_bytes(make(**WIDE), 1, EAGER, False, 1, 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [start(peak_of_a_rank, **place, RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2") for rank in ("0", "1")]
    for result in [rank.wait() for rank in ranks]:
        assert float(re.search(r"peak (\d+)", result.out)[1]) == pytest.approx(expected, rel=0.1)


def test_state_is_shared_out_over_ranks():
    model = make(device="meta", n_layer=12, n_embd=768, n_head=6, n_kv_head=6, vocab_size=32768, sequence_len=2048)
    one, eight = (preflight.peak_bytes(model, 1, ("flex", "triton"), True, 1, ranks) for ranks in (1, 8))
    matrices = sum(p.numel() for p in model.blocks.parameters())
    state = 4 * matrices + 8 * (sum(p.numel() for p in model.parameters()) - matrices)
    assert 6 / 8 * state < one - eight < 7 / 8 * (state + 8 * matrices), "Muon's own work is shared out, too"


def test_more_rows_need_more_and_checkpointing_less():
    model = make(torch.bfloat16, "meta", n_layer=24, n_embd=1536, n_head=12, n_kv_head=12, sequence_len=2048)
    for kernels in (EAGER, ("flex", "triton"), ("masked", "eager")):
        plain, again = (
            [preflight.peak_bytes(model, rows, kernels, on, 2) for rows in (1, 2, 4, 8)] for on in (False, True)
        )
        assert plain == sorted(plain) and again == sorted(again)
        assert all(a <= p for a, p in zip(again, plain, strict=True)) and again[3] < 0.5 * plain[3]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_changes_no_bit(dropout):
    results = []
    for on in (False, True):
        model = make(dropout=dropout, sequence_len=128)
        for block in model.blocks:  # zero projections would hide what comes before them
            torch.nn.init.normal_(block.attn.out.weight, std=0.02, generator=torch.Generator().manual_seed(1))
            torch.nn.init.normal_(block.mlp.down.weight, std=0.02, generator=torch.Generator().manual_seed(2))
        model.checkpointing = on
        torch.manual_seed(5)
        loss = model(tokens(model, 2), tokens(model, 2, 1))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- the choice


CPU = Compute(torch.device("cpu"), torch.float32)


def chosen(monkeypatch, model, free, share=24, wanted="auto", checkpointing=None):
    held = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(preflight, "free_memory", lambda device: free - held)
    return preflight.plan(model, share, wanted, checkpointing, CPU)


def test_auto_takes_the_most_rows_that_fit(monkeypatch):
    model = make(n_layer=4)
    need = {
        again: {n: preflight.peak_bytes(model, n, EAGER, again, 24 // n) for n in (24, 12, 8, 6, 4, 3, 2, 1)}
        for again in (False, True)
    }
    for rows in need[False]:
        plan = chosen(monkeypatch, model, need[False][rows] / 0.7 + 9)
        assert (plan.rows, plan.accumulation, plan.checkpointing) == (rows, 24 // rows, False)
        assert plan.peak == need[False][rows] <= plan.free
    plan = chosen(monkeypatch, model, 0.99 * need[False][1] / 0.7)
    assert plan.checkpointing and plan.peak <= plan.free, "no row fits without"
    assert all(peak > plan.free for rows, peak in need[True].items() if rows > plan.rows)
    plan = chosen(monkeypatch, model, need[False][24] / 0.7 + 9, checkpointing=True)
    assert plan.checkpointing and plan.rows == 24, "asked for"
    plan = chosen(monkeypatch, model, 1, wanted=3)
    assert plan.rows == 3 and plan.checkpointing, "a number is obeyed, whatever the memory"
    assert chosen(monkeypatch, model, 1, wanted=3, checkpointing=False).checkpointing is False
    assert [chosen(monkeypatch, model, 1 << 40, share=n, wanted=None).rows for n in (24, 64, 37, 93)] == [24, 32, 1, 31]


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.9])
def test_a_refusal_says_what_would_fit(monkeypatch, fraction):
    model = make(device="meta", n_layer=4, n_head=4, n_kv_head=4, n_embd=256, sequence_len=4096)
    free = fraction * preflight.peak_bytes(model, 1, EAGER, True, 1) / 0.7
    with pytest.raises(ValueError, match="would fit") as refusal:
        chosen(monkeypatch, model, free, share=1)
    text = str(refusal.value)
    depth, length = (int(re.search(rf"--{flag} (\d+)", text)[1]) for flag in ("depth", "max-seq-len"))
    aspect = {"aspect_ratio": 64, "head_dim": 64, "window_pattern": "L"}
    for shape in ((depth, 600, 4096), (4, 600, length)):
        with torch.device("meta"):
            smaller = GPT(recipe.model_config(*shape, **aspect), torch.float32, torch.float32)
        assert chosen(monkeypatch, smaller, free, share=1).rows == 1
    with torch.device("meta"):
        larger = GPT(recipe.model_config(depth + 1, 600, 4096, **aspect), torch.float32, torch.float32)
    with pytest.raises(ValueError, match="would fit"):
        chosen(monkeypatch, larger, free, share=1)


def test_the_free_memory_of_this_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 1 << 20 < preflight.free_memory(torch.device("cpu")) < installed
    groups = "4:memory:/a/b\n2:cpu:/\n0::/c\n"
    files = {
        "/proc/self/cgroup": groups,
        "/sys/fs/cgroup/memory/a/memory.limit_in_bytes": "90000\n",
        "/sys/fs/cgroup/memory/a/memory.stat": "cache 7\nrss 1\ntotal_rss 20000\n",
        "/sys/fs/cgroup/c/memory.max": "80000\n",
        "/sys/fs/cgroup/c/memory.stat": "anon 30000\nfile 7\n",
        "/sys/fs/cgroup/memory.max": "max\n",
    }
    monkeypatch.setattr(preflight, "read_if_there", lambda path: files.get(str(path), ""))
    assert preflight.free_memory(torch.device("cpu")) == 50000
    del files["/sys/fs/cgroup/c/memory.max"]
    assert preflight.free_memory(torch.device("cpu")) == 70000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert preflight.free_memory(torch.device("cpu")) == 35000


# --- the command line


FLAGS = [*BASE, *STEPS, "--num-iterations", "3"]


@pytest.fixture
def fp32(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")


def test_what_a_run_says_before_it_begins(tiny_world, fp32):
    result = run("scripts.base_train", *FLAGS, "--device-batch-size", "auto", "--price", "3600")
    first, second, third = result.out.splitlines()[:3]
    assert first.startswith("base d2: ") and "3 steps of 512 tokens = 1,536" in first and "1 x cpu" in first
    assert "1 x 8 rows" in second and "attention blocks, loss eager, eager;" in second
    needed, free = (float(x) for x in re.findall(r"([\d.]+) GB", second))
    assert 0 < needed < free
    minutes, dollars = re.match(r"  about ([\d.]+) min and \$([\d.,]+), if it reaches 40%", third).groups()
    assert float(dollars) == pytest.approx(60 * float(minutes), abs=3.1)
    again = run("scripts.base_train", *FLAGS, "--activation-checkpointing", "--model-tag", "again")
    assert "activations made again" in again.out
    assert losses("base", "again") == losses("base", "d2")


def test_ranks_agree(tiny_world, fp32):
    first, second = run_ranks(2, "scripts.base_train", *FLAGS, "--device-batch-size", "auto")
    assert (first.code, second.code) == (0, 0), (first, second)
    assert "2 x cpu" in first.out and "1 x 4 rows" in first.out
    assert "rows" not in second.out


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--device-batch-size", "some"], "--device-batch-size"),
        (["--device-batch-size", "0"], "--device-batch-size 0: must be above 0"),
        (["--device-batch-size", "3"], "--device-batch-size 3"),
        (["--fp8"], "--fp8 needs a GPU"),
        (["--price", "-1"], "--price -1.0: must be 0 or more"),
    ],
)
def test_refusals(tiny_world, fp32, flags, named):
    assert named in script("scripts.base_train", *FLAGS, *flags).error_line


def test_auto_in_a_file(tiny_world, tmp_path, fp32):
    (tmp_path / "flags.yaml").write_text("device-batch-size: auto\n")
    run("scripts.base_train", *FLAGS, "--config", str(tmp_path / "flags.yaml"))
    (tmp_path / "flags.yaml").write_text("device-batch-size: some\n")
    assert (
        "'device-batch-size' is 'some'"
        in script("scripts.base_train", *FLAGS, "--config", str(tmp_path / "flags.yaml")).error_line
    )
