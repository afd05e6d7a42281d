"""The model against a transformer written here with plain torch operations, and against what its design states."""

import dataclasses
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import PLAIN, Kernels
from nanochat.language_model import rotate, rotation

# A short window is at least 128 positions, so only a context above that has windows.
SMALL = {"sequence_len": 192, "vocab_size": 100, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
NEUTRAL = {
    "qk_scale": 1.0,
    "softcap": 0.0,
    "value_embed_every": 0,
    "resid_scale_first": 1.0,
    "resid_scale_last": 1.0,
    "embed_skip_first": 0.0,
    "embed_skip_last": 0.0,
    "smear_channels": 0,
    "backout": 0.0,
}


def make(seed=0, randomise=True, kernels=PLAIN, **changes):
    """A model, as initialised or with every parameter random (as initialised, layers add nothing to the residual)."""
    model = GPT(GPTConfig(**{**SMALL, **changes}), kernels=kernels)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    if randomise:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def tokens(B=2, T=160, vocab_size=100, seed=1):
    return torch.randint(0, vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def complex_rotary(x_BTHD, base):
    """Rotary positions as their paper has them: complex number j turned by position · base^(-2j/D)."""
    T, D = x_BTHD.size(1), x_BTHD.size(3)
    rate = base ** (-torch.arange(0, D, 2).double() / D)
    turn_T1D = torch.polar(torch.ones(T, D // 2).double(), torch.arange(T)[:, None] * rate)[:, None]
    z = torch.complex(x_BTHD[..., : D // 2].double(), x_BTHD[..., D // 2 :].double()) * turn_T1D
    return torch.cat((z.real, z.imag), -1).to(x_BTHD.dtype)


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def attention(q, k, v, window):
    T = q.size(1)
    distance_TT = torch.arange(T)[:, None] - torch.arange(T)
    seen_TT = (distance_TT >= 0) & (distance_TT < window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_TT, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


def plain_transformer(model, idx_BT):
    """Pre-norm transformer: embedding, attention and MLP on the residual, head. Nothing of nanochat's own."""
    w, config = dict(model.named_parameters()), model.config
    B, T = idx_BT.shape
    x = rms(w["embed.weight"][idx_BT])
    for i in range(config.n_layer):
        h = rms(x)
        q, k, v = ((h @ w[f"blocks.{i}.attn.{name}.weight"].T).view(B, T, -1, config.head_dim) for name in "qkv")
        q, k = rms(complex_rotary(q, config.rope_base)), rms(complex_rotary(k, config.rope_base))
        x = x + attention(q, k, v, T) @ w[f"blocks.{i}.attn.out.weight"].T
        x = x + (rms(x) @ w[f"blocks.{i}.mlp.up.weight"].T).relu() ** 2 @ w[f"blocks.{i}.mlp.down.weight"].T
    return rms(x) @ w["head.weight"][: config.vocab_size].T


def full_transformer(model, idx_BT):
    """The model as README states it, token by token, with every switch on: the plain transformer and what it adds."""
    w, config = dict(model.named_parameters()), model.config
    B, T = idx_BT.shape
    x = rms(w["embed.weight"][idx_BT])
    smeared = x.clone()
    for t in range(1, T):
        gate = (x[:, t, : config.smear_channels] @ w["smear_gate.weight"].T).sigmoid()
        smeared[:, t] = x[:, t] + w["smear_scale"] * gate * x[:, t - 1]
    x = x0 = smeared
    scale = w["norm_scale"] if config.norm_scales else torch.ones(config.n_layer + 1, 1)
    for i in range(config.n_layer):
        x = w["resid_scale"][i] * x + w["embed_skip"][i] * x0
        h = rms(x)
        q, k, v = ((h @ w[f"blocks.{i}.attn.{name}.weight"].T).view(B, T, -1, config.head_dim) for name in "qkv")
        q, k = (rms(complex_rotary(y, config.rope_base)) * config.qk_scale for y in (q, k))
        if (config.n_layer - 1 - i) % 2 == 0:  # every other layer, the last included
            ve = w[f"value_embeds.{i}.weight"][idx_BT].view_as(v)
            v = v + 3 * (h[..., :12] @ w[f"blocks.{i}.attn.gate.weight"].T).sigmoid()[..., None] * ve
        window = 128 if config.window_pattern[i % len(config.window_pattern)] == "S" and i < config.n_layer - 1 else T
        x = x + attention(q, k, v, window) @ w[f"blocks.{i}.attn.out.weight"].T
        h = rms(x) * scale[i]
        x = x + (h @ w[f"blocks.{i}.mlp.up.weight"].T).relu() ** 2 @ w[f"blocks.{i}.mlp.down.weight"].T
        if i == config.n_layer // 2:
            middle = x
    x = rms(x - w["backout"] * middle) * scale[-1]
    return 15 * torch.tanh(x @ w["head.weight"][: config.vocab_size].T / 15)


# What it computes.


def test_with_neutral_values_it_is_a_plain_transformer():
    model, idx_BT = make(**NEUTRAL, window_pattern="L"), tokens()
    fresh = make(randomise=False, **NEUTRAL)
    with torch.no_grad():  # these are learned, so they must be neutral as initialised
        model.resid_scale.copy_(fresh.resid_scale)
        model.embed_skip.copy_(fresh.embed_skip)
    torch.testing.assert_close(model(idx_BT), plain_transformer(model, idx_BT), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_layer": 3, "n_kv_head": 4}, {"n_layer": 1}, {"window_pattern": "S"}, {"norm_scales": True}],
    ids=str,
)
def test_with_every_switch_on_it_is_the_design(changes):
    model, idx_BT = make(**changes), tokens()
    torch.testing.assert_close(model(idx_BT), full_transformer(model, idx_BT), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("switch", [*NEUTRAL, "rope_base", "window_pattern"])
def test_every_switch_changes_the_result(switch):
    """A switch that the neutral value turns off must do something when on."""
    torch.manual_seed(0)  # by chance a weight can come out too small to be seen
    value = {"rope_base": 10_000.0, "window_pattern": "L"}.get(switch, NEUTRAL.get(switch))
    idx_BT = tokens()
    with torch.no_grad():
        on, off = GPT(GPTConfig(**SMALL)), GPT(GPTConfig(**{**SMALL, switch: value}))
        for model in (on, off):
            model.init_weights(torch.Generator().manual_seed(0))
        weights = {name: p + 0.2 * torch.randn(p.shape) for name, p in on.named_parameters()}
        for model in (on, off):
            scales = {name: getattr(model, name).clone() for name in ("resid_scale", "embed_skip")}
            model.load_state_dict({**{n: weights[n] for n, _ in model.named_parameters()}, **scales})
    assert not torch.allclose(on(idx_BT), off(idx_BT), atol=1e-3)


def test_rotary_is_complex_multiplication_and_knows_only_distance():
    D, T, base = 16, 40, 1000.0
    cos, sin = rotation(torch.arange(T)[None], base ** (-torch.arange(0, D, 2) / D), torch.float32)
    x_BTHD = torch.randn(1, T, 3, D, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(x_BTHD, cos, sin), complex_rotary(x_BTHD, base), rtol=1e-5, atol=1e-5)
    # the same q and k everywhere: their product is constant along diagonals, and differs between them
    q, k = (rotate(x_BTHD[:, :1, h : h + 1].expand(-1, T, -1, -1), cos, sin)[0, :, 0] for h in (0, 1))
    products_TT = q @ k.T
    for distance in range(-T + 1, T):
        diagonal = products_TT.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert products_TT[:, 0].std() > 0.1


@pytest.mark.parametrize("pattern", ["L", "S", "SL", "SSSL", "LS"])
def test_no_token_changes_what_comes_before_it(pattern):
    model, idx_BT = make(window_pattern=pattern), tokens(B=1)
    before = model(idx_BT)
    for t in (0, 1, 77, 128, 159):
        changed = idx_BT.clone()
        changed[0, t] = (changed[0, t] + 1) % 100
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-5, atol=1e-5)
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).gt(1e-4).all()  # the long last layer sees it everywhere


def test_targets_give_the_cross_entropy_of_the_logits():
    model, idx_BT, targets_BT = make(), tokens(), tokens(seed=2)
    targets_BT[:, ::3] = -1
    logits_BTV = model(idx_BT)
    assert logits_BTV.dtype == torch.float32 and logits_BTV.shape == (2, 160, 100)
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-1, reduction=reduction)
        got = model(idx_BT, targets_BT, loss_reduction=reduction)
        torch.testing.assert_close(got, expected.view(got.shape), rtol=1e-5, atol=1e-5)
    assert got.shape == targets_BT.shape


@pytest.mark.parametrize("vocab_size", [64, 100, 1000])
def test_at_init_the_loss_is_that_of_guessing(vocab_size):
    model = make(randomise=False, vocab_size=vocab_size)
    loss = model(tokens(vocab_size=vocab_size), tokens(vocab_size=vocab_size, seed=2))
    assert loss.item() == pytest.approx(math.log(vocab_size), abs=1e-3)


def test_every_parameter_learns():
    """Smear's scale starts at zero and keeps its gate from a gradient for one step; nothing else may stand still."""
    model = make(n_layer=3)
    model(tokens(), tokens(seed=2)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
    assert model.head.weight.grad[model.config.vocab_size :].abs().max() == 0  # rows of the padding


def test_dropout_acts_in_training_only():
    dropped, plain, idx_BT = make(dropout=0.5), make(), tokens()
    assert torch.equal(dropped(idx_BT), plain(idx_BT))
    dropped.train(), plain.train()
    assert not torch.equal(dropped(idx_BT), dropped(idx_BT))
    assert torch.equal(plain(idx_BT), plain(idx_BT))


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="193 tokens exceed the model's context of 192"):
        make()(tokens(T=193))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_equal_eager():
    shape = {"n_layer": 2, "value_embed_every": 1, "window_pattern": "L"}  # layers of one kind, so one graph
    eager, compiled = make(**shape), make(**shape, kernels=Kernels(compiled=True))
    idx_BT, targets_BT = tokens(B=1), tokens(B=1, seed=2)
    losses = []
    for model in (eager, compiled):
        losses.append(model(idx_BT, targets_BT))
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


# How it is made.


def test_made_on_meta_and_poisoned_every_parameter_is_set():
    """Memory that `to_empty` hands out may hold anything, so `init_weights` must set every parameter."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**SMALL), torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    model.init_weights(torch.Generator().manual_seed(0))
    assert model.device == torch.device("cpu")
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
    direct = GPT(GPTConfig(**SMALL), torch.bfloat16)
    direct.init_weights(torch.Generator().manual_seed(0))
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_seed_makes_the_same_weights_and_another_seed_others():
    first, again, other = (make(seed, randomise=False).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    assert not torch.equal(first["blocks.0.attn.q.weight"], first["blocks.1.attn.q.weight"])


def test_initial_values_have_the_documented_statistics():
    width = 256
    shape = {"n_embd": width, "n_head": 4, "n_kv_head": 4, "vocab_size": 2000, "n_layer": 5}
    weights = make(randomise=False, **shape).state_dict()

    def check(name, std, uniform):
        tensor = weights[name].double()
        assert abs(tensor.mean()) < 5 * std / tensor.numel() ** 0.5, name  # five standard errors
        assert tensor.std() == pytest.approx(std, rel=0.02), name
        assert (tensor.abs().max() <= 3**0.5 * std * 1.001) == uniform, name

    check("embed.weight", 0.8, uniform=False)
    check("head.weight", 0.001, uniform=False)
    for i in range(5):
        for name in "qkv":
            check(f"blocks.{i}.attn.{name}.weight", width**-0.5, uniform=True)
        check(f"blocks.{i}.mlp.up.weight", 0.4 * width**-0.5, uniform=True)
        assert weights[f"blocks.{i}.attn.out.weight"].abs().max() == 0
        assert weights[f"blocks.{i}.mlp.down.weight"].abs().max() == 0
    for name in ("blocks.0.attn.gate.weight", "smear_gate.weight"):
        gate = weights[name]
        assert 0 <= gate.min() < gate.max() <= 0.02, name
    torch.testing.assert_close(weights["resid_scale"], torch.tensor([1.15, 1.125, 1.10, 1.075, 1.05]))
    torch.testing.assert_close(weights["embed_skip"], torch.tensor([0.20, 0.1625, 0.125, 0.0875, 0.05]))
    assert weights["smear_scale"] == 1 and weights["backout"].item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    "dtype, embed_dtype", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]
)
def test_names_and_dtypes_of_parameters(dtype, embed_dtype):
    model = GPT(GPTConfig(**SMALL), dtype, embed_dtype)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    matrices = ["attn.q", "attn.k", "attn.v", "attn.out", "mlp.up", "mlp.down"]
    names = {f"blocks.{i}.{name}.weight" for i in range(4) for name in matrices}
    names |= {f"{where}.weight" for i in (1, 3) for where in (f"value_embeds.{i}", f"blocks.{i}.attn.gate")}
    names |= {"embed.weight", "head.weight", "smear_gate.weight", "smear_scale", "resid_scale", "embed_skip", "backout"}
    assert set(dtypes) == set(model.state_dict()) == names
    for name, got in dtypes.items():
        assert got == ((embed_dtype or dtype) if "embed" in name and name != "embed_skip" else torch.float32), name
    assert model.embed.weight.shape == model.head.weight.shape == (128, 32)  # 100 tokens, rounded up to 64


def test_bf16_stays_close_to_fp32():
    model, idx_BT = make(), tokens()
    half = GPT(model.config, torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())
    expected, got = model(idx_BT), half(idx_BT)
    assert got.dtype == torch.float32
    assert (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("every, layers", [(2, (1, 3, 5)), (1, (0, 1, 2, 3, 4, 5)), (3, (2, 5)), (0, ())])
def test_value_embeddings_sit_on_every_nth_layer_counted_from_the_last(every, layers):
    model = GPT(GPTConfig(**{**SMALL, "n_layer": 6, "value_embed_every": every}))
    assert tuple(map(int, model.value_embeds)) == layers


@pytest.mark.parametrize(
    "pattern, n_layer, T, windows",
    [
        ("SSSL", 5, 2048, (512, 512, 512, 2048, 2048)),
        ("SSSL", 6, 2048, (512, 512, 512, 2048, 512, 2048)),
        ("S", 3, 1024, (256, 256, 1024)),
        ("L", 2, 1024, (1024, 1024)),
        ("SL", 2, 1000, (256, 1000)),  # 250 rounded up to 128s
        ("SL", 2, 512, (128, 512)),
        ("SL", 2, 64, (64, 64)),  # never longer than the context
        ("S", 1, 2048, (2048,)),
    ],
)
def test_windows(pattern, n_layer, T, windows):
    config = GPTConfig(**{**SMALL, "window_pattern": pattern, "n_layer": n_layer, "sequence_len": T})
    assert config.windows == windows


def test_flops_per_token_in_closed_form():
    """Six for each weight of a matrix product; scores and weighted values, 2·2·D a head and position, three times."""
    model = GPT(GPTConfig(**{**SMALL, "n_layer": 2, "window_pattern": "S"}))
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 2 * 4 * 32 * 32  # q, k and v of half as many heads, out, MLP
    matrices = 2 * block + 12 * 2 + 128 * 32  # one gate of 12 x 2 kv heads, the padded head
    attention_flops = 3 * 2 * 2 * 32 * (128 + 192)
    assert model.flops_per_token() == 6 * matrices + attention_flops


# The config.


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"n_layer": 0}, "positive"),
        ({"sequence_len": 0}, "positive"),
        ({"vocab_size": -1}, "positive"),
        ({"n_head": 0}, "positive"),
        ({"n_kv_head": 0}, "positive"),
        ({"n_embd": 30}, "--head-dim"),
        ({"n_kv_head": 3}, "n_kv_head 3"),
        ({"n_embd": 36, "n_head": 12, "n_kv_head": 12}, "even"),
        ({"n_embd": 16}, "narrower than its gates"),
        ({"window_pattern": "SSX"}, "--window-pattern 'SSX'"),
        ({"window_pattern": ""}, "--window-pattern"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"dropout": -0.1}, "dropout -0.1"),
    ],
)
def test_a_wrong_config_is_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SMALL, **wrong})


def test_the_config_survives_a_dict_and_unknown_keys_do_not():
    config = GPTConfig(**SMALL, dropout=0.1)
    values = dataclasses.asdict(config)
    assert GPTConfig.from_dict(values) == config
    # Checkpoints from before the scales of norms say nothing of them, and have none.
    del values["norm_scales"]
    assert "norm_scale" not in dict(GPT(GPTConfig.from_dict(values)).named_parameters())
    with pytest.raises(ValueError, match="mtp_heads, n_experts"):
        GPTConfig.from_dict({**values, "n_experts": 4, "mtp_heads": 1})
