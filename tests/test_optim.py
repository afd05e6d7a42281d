"""The optimizer. Oracles: torch's AdamW, the SVD, closed forms of a first step, and one process for several ranks."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from nanochat.compute import Compute, can_compile
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, adamw_update, muon_update, orthogonalize

CPU = torch.device("cpu")
LRS = {"matrix": 0.02, "embedding": 0.3, "unembedding": 0.008, "scalar": 0.5}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# AdamW.


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.96)])
def test_adamw_equals_torch(weight_decay, betas):
    w = randn(13, 7)
    parameter = torch.nn.Parameter(w.clone())
    oracle = torch.optim.AdamW([parameter], lr=0.01, betas=betas, eps=1e-10, weight_decay=weight_decay)
    mean, square = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(20):
        g = randn(13, 7, seed=step + 1) * 10.0 ** (step % 3 - 1)
        parameter.grad = g.clone()
        oracle.step()
        adamw_update(w, g, mean, square, step, 0.01, betas, weight_decay)
        torch.testing.assert_close(w, parameter.detach(), rtol=1e-6, atol=1e-6)


def test_adamw_keeps_fp32_moments_of_a_bf16_parameter():
    w, w32, g = randn(50).bfloat16(), randn(50).bfloat16().float(), randn(50, seed=1).bfloat16()
    moments = [torch.zeros(50) for _ in range(4)]
    adamw_update(w, g, *moments[:2], 0, 0.01, (0.8, 0.96), 0.0)
    adamw_update(w32, g, *moments[2:], 0, 0.01, (0.8, 0.96), 0.0)
    assert torch.equal(moments[0], moments[2]) and torch.equal(moments[1], moments[3])
    torch.testing.assert_close(w.float(), w32, rtol=2**-8, atol=0)


def test_decay_of_a_bf16_table_does_something():
    """lr·decay is 2^-11, below half of bf16's resolution: as a step of its own each would round to nothing."""
    shrunk = []
    for decay in (0.0, 2**-6):
        w, mean, square = torch.ones(20_000).bfloat16(), torch.zeros(20_000), torch.zeros(20_000)
        for step in range(200):
            g = randn(20_000, seed=step).bfloat16()
            adamw_update(w, g, mean, square, step, 2**-5, (0.8, 0.96), decay)
        shrunk.append(w.float().mean().item())
    assert shrunk[0] == pytest.approx(1, abs=0.01)
    assert shrunk[1] / shrunk[0] == pytest.approx((1 - 2**-11) ** 200, abs=0.01)  # .907


def test_the_update_of_a_bf16_table_is_rounded_once():
    w, g = randn(5000).bfloat16(), randn(5000, seed=1).bfloat16()
    exact = w.float()
    adamw_update(exact, g, torch.zeros(5000), torch.zeros(5000), 0, 0.3, (0.8, 0.995), 0.1)
    adamw_update(w, g, torch.zeros(5000), torch.zeros(5000), 0, 0.3, (0.8, 0.995), 0.1)
    assert torch.equal(w, exact.bfloat16())


# Muon.


@settings(max_examples=20, deadline=None)
@given(M=st.integers(1, 80), N=st.integers(1, 80), scale=st.sampled_from([1e-4, 1.0, 1e4]), seed=st.integers(0, 99))
def test_orthogonalized_singular_values_are_at_most_about_one(M, N, scale, seed):
    values = torch.linalg.svdvals(orthogonalize(randn(2, M, N, seed=seed) * scale).float())
    assert values.max() < 1.2 and values.max() > 0.8


@pytest.mark.parametrize("M, N", [(64, 256), (256, 64), (2, 12), (128, 512)])
def test_orthogonalize_finds_the_polar_factor(M, N):
    g_KMN = randn(3, M, N) * torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    got = orthogonalize(g_KMN).float()
    u, _, vh = torch.linalg.svd(g_KMN, full_matrices=False)
    values = torch.linalg.svdvals(got)
    assert values.min() > 0.8 and values.max() < 1.2
    assert (got - u @ vh).norm() < 0.15 * (u @ vh).norm()


def muon_step(w, g, lr=0.1, momentum=0.0, weight_decay=0.0):
    """One step from empty state; returns the new weights and leaves the old ones."""
    neurons = (*w.shape[:2], 1) if w.size(1) >= w.size(2) else (w.size(0), 1, w.size(2))
    w, buffers = w.clone(), (torch.zeros_like(w), torch.zeros(neurons))
    muon_update(w, g, *buffers, lr, momentum, weight_decay)
    return w


@pytest.mark.parametrize("M, N, scale", [(64, 64, 1.0), (64, 256, 1.0), (256, 64, 2.0), (144, 16, 3.0)])
def test_a_muon_step_has_the_size_of_an_orthogonal_matrix_whatever_the_gradient(M, N, scale):
    """‖UVᵀ‖ = √min(M, N): normalising neurons must not change it; tall matrices step √(M/N) further."""
    w_KMN, g_KMN = randn(3, M, N), randn(3, M, N, seed=1)
    change = w_KMN - muon_step(w_KMN, g_KMN)
    sizes = change.norm(dim=(1, 2)) / (0.1 * scale * min(M, N) ** 0.5)
    assert ((sizes > 0.85) & (sizes < 1.15)).all()
    louder = w_KMN - muon_step(w_KMN, g_KMN * 1000)
    assert (louder - change).norm() < 0.02 * change.norm()


@pytest.mark.parametrize("M, N, neuron_dim", [(96, 32, 2), (32, 96, 1)])
def test_every_neuron_moves_as_far_as_any_other(M, N, neuron_dim):
    """Rows of unequal size in the gradient, as NorMuon has it: after a first step all neurons moved alike."""
    g_KMN = randn(2, M, N) * torch.logspace(-2, 2, M)[:, None]
    w_KMN = torch.zeros(2, M, N)
    moved = muon_step(w_KMN, g_KMN).norm(dim=neuron_dim)
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), rtol=1e-4, atol=0)


def test_momentum_is_a_moving_average_and_nesterov_looks_ahead():
    w, buffer, variance = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8), torch.zeros(1, 8, 1)
    expected = torch.zeros(1, 8, 8)
    for step in range(5):
        g = randn(1, 8, 8, seed=step)
        expected = 0.9 * expected + 0.1 * g
        muon_update(w, g, buffer, variance, 0.1, 0.9, 0.0)
    torch.testing.assert_close(buffer, expected)

    def direction(matrix):
        u, _, vh = torch.linalg.svd(F.normalize(matrix, dim=-1), full_matrices=False)
        return (u @ vh).flatten()

    old, g, w = buffer.clone(), randn(1, 8, 8, seed=9), torch.zeros(1, 8, 8)
    muon_update(w, g, buffer, torch.zeros(1, 8, 1), 0.1, 0.9, 0.0)
    nesterov, plain = 0.19 * g + 0.81 * old, 0.1 * g + 0.9 * old
    alike = [F.cosine_similarity(-w.flatten(), direction(matrix), dim=0) for matrix in (nesterov, plain)]
    assert alike[0] > 0.97 and alike[0] > alike[1] + 0.02


def test_muon_descends():
    w, target = torch.zeros(2, 24, 48), randn(2, 24, 48)
    buffer, variance = torch.zeros_like(w), torch.zeros(2, 1, 48)
    first = (w - target).square().sum()
    for step in range(100):
        muon_update(w, 2 * (w - target), buffer, variance, 0.3 * (1 - step / 100), 0.9, 0.0)
    assert (w - target).square().sum() < 1e-2 * first


def test_weight_decay_acts_only_where_it_agrees_with_the_step():
    w, g = randn(2, 16, 16), randn(2, 16, 16, seed=1)
    plain, decayed = muon_step(w, g), muon_step(w, g, weight_decay=0.5)
    towards_zero = (w - plain) * w > 0
    assert 0.2 < towards_zero.float().mean() < 0.8
    torch.testing.assert_close(plain - decayed, torch.where(towards_zero, 0.1 * 0.5 * w, 0.0), rtol=1e-4, atol=1e-6)


def test_a_zero_gradient_moves_nothing():
    w = randn(2, 16, 8)
    assert torch.equal(muon_step(w, torch.zeros_like(w), weight_decay=0.5), w)


# The whole.


def test_scales_of_norms_learn_as_slowly_as_residual_scales():
    """They are one row a block and one for the head. Both kinds learn at 1 % of the scalars' rate."""
    shape = {"sequence_len": 64, "vocab_size": 100, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
    model = GPT(GPTConfig(**shape, norm_scales=True))
    model.init_weights(torch.Generator().manual_seed(0))
    before = model.norm_scale.detach().clone()
    assert torch.equal(before, torch.ones(4, 64))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = MuonAdamW(model, LRS, 0.1, Compute(CPU, torch.float32))
    optimizer.step(0)
    # Adam's first step is the learning rate; decay adds a twentieth of it.
    expected = torch.full((4, 64), 0.01 * LRS["scalar"] * 1.05)
    torch.testing.assert_close(before - model.norm_scale, expected, rtol=1e-3, atol=0)


def make(compute=None, seed=0, weight_decay=0.1, compiled=False):
    shape = {"sequence_len": 64, "vocab_size": 100, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
    model = GPT(GPTConfig(**shape))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model, MuonAdamW(model, LRS, weight_decay, compute or Compute(CPU, torch.float32), compiled)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(got, expected, tolerance=0.0):
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=tolerance, msg=name)


def test_every_parameter_has_its_learning_rate():
    """Adam's first step is lr·sign(g), and its decay lr·decay·w: what a parameter moved by tells both."""
    model, optimizer = make(weight_decay=0.0)
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    signs = {name: p.grad.sign() for name, p in model.named_parameters()}
    optimizer.step(0, lr_mult=0.5)
    width = (64 / 768) ** -0.5
    stated = {
        "embed.weight": (0.3 * width, 0.001),
        "head.weight": (0.008 * width, 0.01),
        "value_embeds.0.weight": (0.3 * width / 2, 0.01),
        "value_embeds.2.weight": (0.3 * width / 2, 0.01),
        "resid_scale": (0.5 * 0.01, 0.05),
        "embed_skip": (0.5, 0.0),
    }
    after = weights(model)
    for name, (lr, decay) in stated.items():
        expected = before[name] * (1 - lr / 2 * decay) - lr / 2 * signs[name]
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-5, msg=name)
    for name, value in after.items():
        assert not torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())
    q = "blocks.1.attn.q.weight"  # Muon: 0.02 · √64 is the size of the step
    assert (after[q] - before[q]).norm() == pytest.approx(0.5 * 0.02 * 8, rel=0.15)


def test_a_model_learns_a_sequence_by_heart():
    model, optimizer = make()
    model.init_weights(torch.Generator().manual_seed(0))
    idx_BT = torch.randint(0, 100, (2, 33), generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(15):
        losses.append(model(idx_BT[:, :-1], idx_BT[:, 1:]))
        losses[-1].backward()
        optimizer.step(step, momentum=0.85)
    assert losses[-1] < 0.3 * losses[0]


def test_without_decay_and_learning_rate_nothing_moves():
    model, optimizer = make()
    before = weights(model)
    set_gradients(model, 0, range(6))
    optimizer.step(0, lr_mult=0.0)
    assert_same(weights(model), before)


def test_compiled_updates_are_the_same_and_compiled_once(monkeypatch):
    """What changes from step to step must not be a constant of the graphs. Here they are made but not fused."""
    graphs = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    torch._dynamo.reset()
    expected, plain = make()
    model, optimizer = make(compiled=True)
    for first in range(0, 6, 2):
        train(expected, plain, range(first, first + 2))
        train(model, optimizer, range(first, first + 2))
        if first == 0:
            in_the_first_steps = graphs.frame_count
    assert in_the_first_steps == graphs.frame_count > 3
    assert_same(weights(model), weights(expected), 1e-5)


@pytest.mark.skipif(not can_compile(CPU), reason="torch.compile needs a C++ compiler")
def test_fused_updates_are_the_same():
    torch._dynamo.reset()
    state = [torch.zeros(2, 32, 48), torch.zeros(2, 1, 48)]
    moments = [torch.zeros(40, 16), torch.zeros(40, 16)]
    results = []
    for fuse in (lambda f: f, functools.partial(torch.compile, dynamic=False, fullgraph=True)):
        number = float if not results else torch.tensor
        muon, adamw = fuse(muon_update), fuse(adamw_update)
        w, table = randn(2, 32, 48), randn(40, 16).bfloat16()
        buffers = [value.clone() for value in (*state, *moments)]
        for step in range(3):
            lr = number(0.1 / (step + 1))
            g_KMN = randn(2, 32, 48, seed=step)
            muon(w, g_KMN, *buffers[:2], lr, number(0.9), number(0.1), dtype=torch.float32)
            adamw(table, randn(40, 16, seed=step), *buffers[2:], number(float(step)), lr, (0.8, 0.96), 0.01)
        results.append([w, table.float(), *buffers])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=2**-7, atol=1e-5)  # a bf16 may be rounded the other way


def test_a_rank_stacks_its_own_matrices_alone(monkeypatch):
    """All of them are 24 layers of a large model; its own are an eighth of that."""
    _, optimizer = make(Compute(CPU, torch.float32, rank=1, world_size=3))
    [group] = [group for group in optimizer.groups if group.name == "muon_64x64"]
    stacked = []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda tensors: stacked.append(len(tensors)) or stack(tensors))
    share = group.share(group.parameters, rank=1)
    assert len(group.parameters) == 6 and stacked == [2]
    assert torch.equal(share, stack([group.parameters[1], group.parameters[4]]))
    whole = group.all_shares(group.parameters)
    assert stacked == [2, 6]
    assert all(torch.equal(a, b) for a, b in zip(group.from_shares(whole, 3), group.parameters, strict=True))


# Ranks. A step's gradient is the sum of six parts, dealt to the ranks; parts are multiples of 2^-10, so that their sum
# is exact in any order. A part leaves every other parameter out, as a loss may.

PARTS, STEPS, SAVED = 6, 4, 2


def set_gradients(model, step, parts):
    for number, parameter in enumerate(model.parameters()):
        for part in parts:
            generator = torch.Generator().manual_seed(1000 * step + 100 * part + number)
            gradient = torch.randint(-1024, 1025, parameter.shape, generator=generator) / 1024
            if (part + number) % 2:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def train(model, optimizer, steps):
    compute = optimizer.compute
    for step in steps:
        set_gradients(model, step, range(compute.rank, PARTS, compute.world_size))
        optimizer.step(step, lr_mult=1 - 0.1 * step, momentum=0.9, wd_mult=0.5)


def rank_main(rank, folder):
    """What each process does, as one of two ranks if it is one of the first two, then as one of three."""
    torch.set_num_threads(1)
    for world_size in (2, 3):
        if rank < world_size:
            join_and_train(rank, world_size, folder)


def join_and_train(rank, world_size, folder):
    """Leaves what this rank has to show as a file in `folder`."""
    meeting = f"file://{folder}/meeting{world_size}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    compute = Compute(CPU, torch.float32, rank, world_size)
    result = {}
    model, optimizer = make(compute)
    train(model, optimizer, range(SAVED))
    result["saved"] = {"weights": weights(model), "state": {k: v.clone() for k, v in optimizer.state_dict().items()}}
    train(model, optimizer, range(SAVED, STEPS))
    result["weights"] = weights(model)
    if world_size == 3:  # go on from what two ranks saved
        saved = [torch.load(f"{folder}/2_{r}.pt")["saved"] for r in range(2)]
        model, optimizer = make(compute, seed=1)
        model.load_state_dict(saved[0]["weights"])
        optimizer.load_state_dicts([share["state"] for share in saved])
        train(model, optimizer, range(SAVED, STEPS))
        result["resumed"] = weights(model)
    model, optimizer = make(compute)
    set_gradients(model, 0, range(rank, PARTS, world_size))
    result["norm"] = optimizer.step(0, clip=1.0)
    result["clipped"] = optimizer.state_dict()
    torch.save(result, f"{folder}/{world_size}_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """{number of ranks: what each of them has to show}"""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, (str(folder),), nprocs=3)
    return {n: [torch.load(folder / f"{n}_{rank}.pt") for rank in range(n)] for n in (2, 3)}


@pytest.fixture(scope="module")
def alone():
    """The same on one process: (weights and state when saved, weights at the end)."""
    model, optimizer = make()
    train(model, optimizer, range(SAVED))
    saved = {"weights": weights(model), "state": {k: v.clone() for k, v in optimizer.state_dict().items()}}
    train(model, optimizer, range(SAVED, STEPS))
    return saved, weights(model)


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_ranks_equal_one_process(world_size, ranks, alone):
    for rank in ranks[world_size]:
        assert_same(rank["weights"], alone[1], 1e-5)
        assert_same(rank["weights"], ranks[world_size][0]["weights"])  # and each other, to the bit


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_rank_keeps_its_share_of_the_state(world_size, ranks, alone):
    whole = sum(value.numel() for value in alone[0]["state"].values())
    shares = [sum(value.numel() for value in rank["saved"]["state"].values()) for rank in ranks[world_size]]
    assert max(shares) < 1.4 * whole / world_size  # three matrices of a shape do not divide evenly by two


def test_saved_state_goes_on_exactly(alone):
    model, optimizer = make(seed=1)
    model.load_state_dict(alone[0]["weights"])
    optimizer.load_state_dicts([alone[0]["state"]])
    assert_same(optimizer.state_dict(), alone[0]["state"])
    train(model, optimizer, range(SAVED, STEPS))
    assert_same(weights(model), alone[1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_state_of_several_ranks_loads_on_one(world_size, ranks, alone):
    model, optimizer = make(seed=1)
    model.load_state_dict(ranks[world_size][0]["saved"]["weights"])
    optimizer.load_state_dicts([rank["saved"]["state"] for rank in ranks[world_size]])
    assert_same(optimizer.state_dict(), alone[0]["state"], 1e-5)
    train(model, optimizer, range(SAVED, STEPS))
    assert_same(weights(model), alone[1], 1e-5)


def test_state_of_two_ranks_loads_on_three(ranks, alone):
    for rank in ranks[3]:
        assert_same(rank["resumed"], alone[1], 1e-5)


def test_clipping_measures_the_whole_gradient_after_reduction(ranks):
    """Each rank alone has the norm of its own rows only, which is another one. What was clipped shows in Adam's first
    mean: it is (1 - β1) times the clipped gradient.
    """
    model, optimizer = make()
    set_gradients(model, 0, range(PARTS))
    gradient = model.head.weight.grad.clone()
    norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt().item()
    assert norm > 1
    assert optimizer.step(0, clip=1.0) == pytest.approx(norm, rel=1e-5)
    expected = F.pad((1 - 0.8) * (gradient / norm), (0, 0, 0, 1))
    for n, results in ((1, [{"clipped": optimizer.state_dict()}]), *ranks.items()):
        mean = torch.cat([result["clipped"]["head/mean"] for result in results])
        torch.testing.assert_close(mean, expected[: len(mean)], rtol=1e-4, atol=1e-7, msg=f"{n} ranks")
    for result in (*ranks[2], *ranks[3]):
        assert result["norm"] == pytest.approx(norm, rel=1e-5)


def test_a_small_gradient_is_not_clipped_and_no_clip_measures_nothing():
    results = []
    for clip in (None, 1e6):
        model, optimizer = make()
        set_gradients(model, 0, range(PARTS))
        norm = optimizer.step(0, clip=clip)
        results.append(weights(model))
        assert (norm is None) == (clip is None)
    assert_same(*results)


def test_state_of_another_model_is_refused(alone):
    state = alone[0]["state"]
    _, optimizer = make()
    with pytest.raises(ValueError, match="lacks head/square"):
        optimizer.load_state_dicts([{k: v for k, v in state.items() if k != "head/square"}])
    with pytest.raises(ValueError, match="embed/mean is of another model"):
        optimizer.load_state_dicts([{**state, "embed/mean": torch.zeros(64 * 64)}])
