"""How kernels are judged and chosen: candidates that are right, wrong in value, wrong in gradient, and broken."""

import json
import os
import socket
import sys

import pytest
import torch
from test_attention import assert_same, make, masked_sdpa
from tiny_run import BASE, STEPS, start

from nanochat import attention, checkpoint, cli, kernels
from nanochat.attention import attend_blocks, attend_naive, attend_sdpa, flash3, padded
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import Kernels, agrees, attention_works, choose_attention, load_attention
from scripts import base_train

CPU = torch.device("cpu")


def raises(x):
    raise RuntimeError("out of resource: shared memory\nand more lines")


JUDGED = [
    (lambda x: x.sin(), None),
    (lambda x: x.sin() * 1.001, "wrong results"),
    (lambda x: x.sin() + (x - x.detach()), "wrong results"),  # right value, wrong gradient
    (lambda x: x.sin() * float("nan"), "wrong results"),
    (lambda x: x.sin().detach(), "does not require grad"),
    (raises, "out of resource: shared memory"),
]


@pytest.mark.parametrize("form, reason", JUDGED)
def test_a_probe_passes_only_what_agrees_forward_and_backward(form, reason, capsys):
    inputs = [torch.linspace(-2, 2, 50)]
    with torch.inference_mode():
        assert agrees("candidate", form, torch.sin, inputs) == (reason is None)
    printed = capsys.readouterr().out
    assert (reason in printed and printed.count("\n") == 1) if reason else not printed


# Backends that look well and are not: what each does wrong, and nothing else.


def fails_on_launch(q, k, v, window):
    raise RuntimeError("no kernel image is available for execution on the device\nand more lines")


def fails_without_a_word(q, k, v, window):
    raise NotImplementedError


def forgets_the_window(q, k, v, window):
    return attend_naive(q, k, v, q.size(1))


def sees_one_too_many(q, k, v, window):
    return attend_naive(q, k, v, window + 1)


def has_no_gradient(q, k, v, window):
    return attend_naive(q, k, v, window).detach()


def has_no_gradient_for_keys(q, k, v, window):
    return attend_naive(q, k.detach(), v, window)


def has_nan_gradients(q, k, v, window):
    y = attend_naive(q, k, v, window)
    return y + (y - y.detach()).clamp(min=0).sqrt()  # value unchanged, d sqrt(0) is infinite


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.5


def has_wrong_gradients(q, k, v, window):
    return WrongGradient.apply(attend_naive(q, k, v, window))


BROKEN = [
    fails_on_launch,
    fails_without_a_word,
    forgets_the_window,
    sees_one_too_many,
    has_no_gradient,
    has_no_gradient_for_keys,
    has_nan_gradients,
    has_wrong_gradients,
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_attention_kernel_is_refused(broken, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "flash3", lambda: broken)
    assert not attention_works("flash-attention-3", CPU, torch.float32, 16, windowed=True)
    printed = capsys.readouterr().out
    assert printed.startswith("attention by flash-attention-3 refused: ") and printed.count("\n") == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_right_kernel_is_taken_where_gradients_are_off_too(context, monkeypatch):
    monkeypatch.setattr(kernels, "flash3", lambda: attend_blocks)
    with context():
        assert attention_works("flash-attention-3", CPU, torch.float32, 16, windowed=True)


def not_installed():
    raise ImportError("No module named 'flash_attn_interface'")


@pytest.fixture
def cuda_names(monkeypatch):
    """The CPU is offered the forms of attention that a GPU has."""
    names = kernels.attention_names
    monkeypatch.setattr(kernels, "attention_names", lambda device, windowed: names(torch.device("cuda"), windowed))


@pytest.mark.parametrize(
    "working, windowed, name",
    [
        ({"flash3", "cudnn", "flex"}, True, "flash-attention-3"),
        ({"flash3", "cudnn", "flex"}, False, "flash-attention-3"),
        ({"cudnn", "flex"}, True, "flex and cudnn"),
        ({"cudnn", "flex"}, False, "cudnn"),
        ({"flex"}, True, "flex and sdpa"),
        ({"cudnn"}, True, "sdpa"),
        (set(), False, "sdpa"),
        (set(), True, "sdpa"),
    ],
)
def test_on_cuda_the_fastest_that_works_is_chosen_and_is_right(working, windowed, name, monkeypatch, cuda_names):
    for loader in ("flash3", "cudnn", "flex"):
        monkeypatch.setattr(kernels, loader, (lambda: attend_sdpa) if loader in working else not_installed)
    assert choose_attention(CPU, torch.float32, 16, windowed) == name
    attend = load_attention(name, torch.device("cuda"))
    for window in (128, 300) if windowed else (300,):
        assert_same(attend, masked_sdpa, *make(300), window, 2e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("windowed", [True, False])
def test_what_is_chosen_on_this_gpu_is_right(windowed):
    device = torch.device("cuda", 0)
    attend = load_attention(choose_attention(device, torch.bfloat16, 64, windowed), device)
    q, k, v = make(300, D=64, dtype=torch.bfloat16, device=device)
    assert_same(attend, masked_sdpa, q, k, v, 128 if windowed else 300, 5e-2)


FLASH3 = """
import torch

def scores(q, k, scale, left):
    distance = torch.arange(q.size(1))[:, None] - torch.arange(k.size(1))
    seen = (distance >= 0) & (distance <= left)  # its window counts the keys before the query's own
    return (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).masked_fill(~seen, float("-inf"))

def per_query_head(q, k, v):
    group = q.size(2) // k.size(2)
    return (x.repeat_interleave(group, 2) for x in (k, v))

def _flash_attn_forward(q, k, v, *, softmax_scale, causal, window_size_left, window_size_right):
    assert causal and window_size_right == 0
    kk, vv = per_query_head(q, k, v)
    z = scores(q, kk, softmax_scale, window_size_left)
    y = torch.einsum("bhqk,bkhd->bqhd", z.softmax(-1), vv)
    return y.contiguous(), z.logsumexp(-1), torch.tensor([]), torch.tensor([])

def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, *, dq, dk, dv, softmax_scale, is_causal, window_size_left, window_size_right
):
    assert is_causal and window_size_right == 0
    kk, vv = per_query_head(q, k, v)
    p = (scores(q, kk, softmax_scale, window_size_left) - softmax_lse[..., None]).exp()
    dp = torch.einsum("bqhd,bkhd->bhqk", dout, vv)
    dz = p * (dp - (dout * out).sum(-1).mT[..., None]) * softmax_scale
    dq.copy_(torch.einsum("bhqk,bkhd->bqhd", dz, kk))
    per_kv_head = lambda x: x.unflatten(2, (k.size(2), -1)).sum(3)
    dk.copy_(per_kv_head(torch.einsum("bhqk,bqhd->bkhd", dz, q)))
    dv.copy_(per_kv_head(torch.einsum("bhqk,bqhd->bkhd", p, dout)))
"""
HUB = """
from types import SimpleNamespace
import hub_flash

def get_kernel(name, version):
    assert (name, version) == ("kernels-community/flash-attn3", 1)
    return SimpleNamespace(flash_attn_interface=hub_flash)
"""


@pytest.fixture
def flash3_stand_in(tmp_path, monkeypatch):
    """Install, by its source, FlashAttention-3's interface (its low-level one), written out with plain operations."""

    def install(source):
        name = {"package": "flash_attn_interface", "hub": "hub_flash"}[source]
        (tmp_path / f"{name}.py").write_text(FLASH3)
        if source == "hub":
            (tmp_path / "kernels.py").write_text(HUB)
        monkeypatch.syspath_prepend(tmp_path)
        attention.flash3_interface.cache_clear()

    yield install
    attention.flash3_interface.cache_clear()
    for name in ("flash_attn_interface", "hub_flash", "kernels"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("source", ["package", "hub"])
def test_flash_attention_3_is_called_by_its_own_conventions(source, flash3_stand_in):
    flash3_stand_in(source)
    for window in (5, 33):
        assert_same(flash3(), masked_sdpa, *make(33), window, 1e-5)


def test_where_flash_attention_3_is_not_installed_the_loader_says_so():
    with pytest.raises(ImportError):
        flash3()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_with_flash_attention_3_is_one_graph(recompute, flash3_stand_in):
    """Also under recomputation, and with the gradients of the eager model."""
    flash3_stand_in("package")
    graphs = []

    def count_graphs(graph, inputs):
        graphs.append(graph)
        return graph.forward

    losses, gradients = [], []
    idx_BT = torch.randint(64, (2, 256), generator=torch.Generator().manual_seed(0))
    for compiled in (False, True):
        model = GPT(GPTConfig(256, 64, 4, 2, 2, 32, "SL"), kernels=Kernels(attend=flash3()))
        model.init_weights(torch.Generator().manual_seed(0))
        if compiled:
            torch._dynamo.reset()
            for block in model.blocks:
                block.compile(dynamic=False, backend=count_graphs)
        loss = model(idx_BT, idx_BT, recompute=recompute)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.blocks[0].attn.v.weight.grad)
    # Layers 0 and 2 have short windows, 1 and 3 long ones and value embeddings: two kinds of blocks.
    assert len(graphs) == 2
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])


# Lengths: kernels that compile or plan for each of them see multiples of 128 alone.


@pytest.mark.parametrize("window", [128, 300, 320, 1000])
@pytest.mark.parametrize("T", [1, 127, 128, 300])
def test_padding_changes_neither_values_nor_gradients(T, window):
    lengths = []

    def kernel(q, k, v, window):
        lengths.append(q.size(1))
        return masked_sdpa(q, k, v, window)

    assert_same(padded(kernel), masked_sdpa, *make(T), window, 1e-5)
    assert lengths == [-(-T // 128) * 128]


def test_a_window_that_covers_the_row_still_does_after_padding():
    """Otherwise full attention would become attention with a window, which is slower."""
    seen = []
    padded(lambda q, k, v, window: seen.append((q.size(1), window)) or q)(*make(300), 300)
    assert seen == [(384, 384)]


@pytest.mark.parametrize("working", [{"cudnn", "flex"}, {"cudnn"}, {"flex"}, set()], ids=str)
@pytest.mark.parametrize("windowed", [True, False])
def test_on_cuda_rows_of_all_lengths_are_a_few_lengths(working, windowed, monkeypatch, cuda_names):
    lengths = set()

    def kernel(q, k, v, window):
        lengths.add(q.size(1))
        return attend_sdpa(q, k, v, window)

    for loader in ("flash3", "cudnn", "flex"):
        monkeypatch.setattr(kernels, loader, (lambda: kernel) if loader in working else not_installed)
    monkeypatch.setattr(kernels, "attend_sdpa", kernel)
    attend = load_attention(choose_attention(CPU, torch.float32, 16, windowed), torch.device("cuda"))
    lengths.clear()
    for T in (5, 100, 129, 200, 256, 257, 300):
        attend(*make(T), 128 if windowed else 300)
    assert lengths == {128, 256, 384}


@pytest.mark.parametrize("hopper, installed", [(True, False), (True, True), (False, False)])
def test_hopper_without_flash_attention_3_says_so_in_one_line(hopper, installed, monkeypatch, capsys, cuda_names):
    monkeypatch.setattr(kernels, "flash3", (lambda: attend_sdpa) if installed else not_installed)
    monkeypatch.setattr(kernels, "cudnn", lambda: attend_sdpa)
    monkeypatch.setattr(kernels, "is_hopper", lambda device: hopper)
    choose_attention(CPU, torch.float32, 16, windowed=False)
    loud = [line for line in capsys.readouterr().out.splitlines() if "pip install kernels" in line]
    assert len(loud) == (hopper and not installed)


# One choice for all ranks, and for the run when it is resumed.


def test_what_a_run_began_with_is_kept_where_it_works(monkeypatch, cuda_names, capsys):
    """Whatever a probe or a stopwatch would prefer today. Where it no longer works, the run goes on and says so."""
    monkeypatch.setattr(kernels, "flash3", lambda: attend_sdpa)
    monkeypatch.setattr(kernels, "cudnn", not_installed)
    monkeypatch.setattr(kernels, "has_kernel", lambda device: True)
    monkeypatch.setattr(kernels, "agrees", lambda *arguments: True)
    monkeypatch.setattr(kernels, "can_compile", lambda device: True)
    seconds = iter([1.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(kernels, "milliseconds", lambda run: next(seconds))

    def choose(recorded):
        shape = {"width": 64, "head_dim": 16, "windowed": False, "compiled": True, "recorded": recorded}
        return kernels.choose_kernels(CPU, **shape).record

    faster = choose(None)
    slower = choose(None)
    assert (faster["attention"], faster["fused_mlp"], slower["fused_mlp"]) == ("flash-attention-3", True, False)
    assert next(seconds, None) is None
    assert [choose(faster), choose(slower)] == [faster, slower], "no time is taken again"
    assert choose({**slower, "attention": "sdpa"})["attention"] == "sdpa"
    assert "have changed" not in capsys.readouterr().out
    assert choose({**faster, "attention": "cudnn"}) == faster
    assert capsys.readouterr().out.count("have changed") == 1


def train_with_a_probe(answers, flags):
    """Pretraining where each rank's probe says something else; "liger" cannot run here."""
    rank = int(os.environ["RANK"])

    def probe(device, dtype, compiled, recorded):
        print(f"rank {rank} chooses, recorded {recorded}")
        return recorded or answers[rank]

    kernels.choose_loss = probe
    sys.argv = ["base_train", *flags]
    cli.run(base_train.main)


def test_ranks_and_resumed_runs_agree(tiny_world, monkeypatch):
    flags = [*BASE, *STEPS, "--num-iterations", "4", "--save-every", "2"]
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    for answers, more, recorded in ((["eager", "liger"], [], None), (["liger", "liger"], ["--resume", "2"], "eager")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        ranks = [
            start(train_with_a_probe, answers, [*flags, *more], **place, RANK=str(r), LOCAL_RANK=str(r))
            for r in range(2)
        ]
        first, second = [rank.wait() for rank in ranks]
        assert (first.code, second.code) == (0, 0), (first, second)
        assert f"rank 0 chooses, recorded {recorded}\n" in first.out and "chooses" not in second.out
        assert checkpoint.read_meta("base", "d2", 4)["kernels"]["loss"] == "eager"
        assert json.loads((tiny_world / "runs/base/d2/run.json").read_text())["kernels"]["loss"] == "eager"
