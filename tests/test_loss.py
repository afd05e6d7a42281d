"""The head's loss against its dense form: torch's cross_entropy on the whole softcapped logits."""

import functools
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat import kernels, loss
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss import chunked_loss_sum, softcap, softcap_cross_entropy


def make(N, C, V, ignored=0.3, seed=0, scale=1.0):
    """x (N, C), W (V, C) with logits of about `scale` times ten, and targets of which a share is ignored."""
    generator = torch.Generator().manual_seed(seed)
    x_NC = torch.randn(N, C, generator=generator) * scale
    w_VC = torch.randn(V, C, generator=generator) * 10 / C**0.5
    targets_N = torch.randint(0, V, (N,), generator=generator)
    targets_N[torch.rand(N, generator=generator) < ignored] = -1
    return x_NC, w_VC, targets_N


def dense(x_NC, w_VC, targets_N, cap, reduction, n_vocab=None):
    logits_NV = x_NC @ w_VC[:n_vocab].T
    if cap:
        logits_NV = cap * torch.tanh(logits_NV / cap)
    return F.cross_entropy(logits_NV, targets_N, ignore_index=-1, reduction=reduction)


def value_and_gradients(function, x_NC, w_VC):
    """The loss and its gradients by x and W; "none" losses are weighted unevenly so that each token's one shows."""
    x_NC, w_VC = x_NC.clone().requires_grad_(), w_VC.clone().requires_grad_()
    loss = function(x_NC, w_VC)
    (loss * torch.linspace(0.5, 2, loss.numel()).view(loss.shape)).sum().backward()
    return loss.detach(), x_NC.grad, w_VC.grad


def in_chunks(x_NC, w_VC, targets_N, cap, reduction, chunk, chunk_gradients=None, n_vocab=None):
    """The loss as the model calls it, but in chunks of a given size."""
    if reduction == "none":
        return loss.losses_by_token(x_NC, w_VC, targets_N, cap, n_vocab or len(w_VC), chunk)
    loss_sum = functools.partial(chunked_loss_sum, chunk=chunk, chunk_gradients=chunk_gradients)
    return softcap_cross_entropy(x_NC, w_VC, targets_N, cap, reduction, loss_sum, n_vocab)


def assert_equals_dense(x_NC, w_VC, targets_N, cap, reduction, *options):
    got = value_and_gradients(lambda x, w: in_chunks(x, w, targets_N, cap, reduction, *options), x_NC, w_VC)
    expected = value_and_gradients(lambda x, w: dense(x, w, targets_N, cap, reduction), x_NC, w_VC)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        # Gradients by x are sums of products with weights of about 10, each of which fp32 rounds.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("cap", [15.0, 0.0])
@pytest.mark.parametrize("chunk", [None, 7, 50, 64])
def test_equals_the_dense_form(reduction, cap, chunk):
    assert_equals_dense(*make(N=50, C=16, V=70), cap, reduction, chunk)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_gradients_the_value_is_the_same(reduction):
    x_NC, w_VC, targets_N = make(N=50, C=16, V=70)
    with torch.no_grad():
        got = softcap_cross_entropy(x_NC, w_VC, targets_N, 15.0, reduction)
        torch.testing.assert_close(got, dense(x_NC, w_VC, targets_N, 15.0, reduction), rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    N=st.integers(1, 40),
    C=st.integers(1, 9),
    V=st.integers(2, 50),
    chunk=st.integers(1, 45),
    cap=st.sampled_from([0.0, 5.0, 30.0]),
    reduction=st.sampled_from(["sum", "none"]),
    seed=st.integers(0, 1000),
)
def test_equals_the_dense_form_for_any_shape(N, C, V, chunk, cap, reduction, seed):
    x_NC, w_VC, targets_N = make(N, C, V, seed=seed)
    assert_equals_dense(x_NC, w_VC, targets_N, cap, reduction, chunk)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("cap", [15.0, 0.0])
@pytest.mark.parametrize("chunk", [None, 7])
def test_rows_that_pad_the_vocabulary_have_no_part_in_the_loss(reduction, cap, chunk):
    """They are not even cut off: autograd would make a gradient of zeros for all rows, and copy into it."""
    x_NC, w_VC, targets_N = make(N=50, C=16, V=70)
    padded_VC = torch.cat((w_VC, torch.full((58, 16), 3.0)))
    got = value_and_gradients(
        lambda x, w: in_chunks(x, w, targets_N, cap, reduction, chunk, n_vocab=70), x_NC, padded_VC
    )
    expected = value_and_gradients(lambda x, w: dense(x, w, targets_N, cap, reduction), x_NC, w_VC)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(got[2][:70], expected[2], rtol=1e-5, atol=5e-5)
    assert not got[2][70:].any()


def test_the_head_of_a_model_is_not_sliced_and_its_padding_gets_no_gradient():
    model = GPT(GPTConfig(32, 100, 1, 2, 2, 32))
    model.init_weights(torch.Generator().manual_seed(0))
    idx_BT = torch.randint(100, (2, 32), generator=torch.Generator().manual_seed(0))
    loss = model(idx_BT, idx_BT)
    chunked_sum, _ = loss.grad_fn.next_functions[0]  # the mean divides it
    head, _ = chunked_sum.next_functions[1]
    assert head.variable is model.head.weight
    loss.backward()
    assert model.head.weight.grad[:100].any() and not model.head.weight.grad[100:].any()


@pytest.mark.parametrize("tokens, chunks", [(65536, 4), (32768, 2), (20480, 2), (16384, 1)])
def test_a_gpu_takes_16k_rows_at_once_where_the_loss_is_compiled(tokens, chunks):
    """The gradient of W is added up in fp32 once per chunk."""
    name = kernels.choose_loss(torch.device("cuda"), torch.bfloat16, compiled=True)
    loss_sum = kernels.load_loss(name, torch.device("cuda"), compiled=True)
    assert name == "compiled"
    assert tokens / loss.chunk_size(torch.empty(tokens, 1, device="meta"), loss_sum.keywords["chunk"]) == chunks


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_the_dense_form():
    compiled = torch.compile(loss.make_chunk_gradients, dynamic=False)
    assert_equals_dense(*make(N=50, C=16, V=70), 15.0, "mean", 32, compiled)


@pytest.mark.parametrize("N, chunk, sizes", [(10, 256, [10]), (12, 8, [6, 6]), (256, 64, [64] * 4), (11, 4, [4, 4])])
def test_chunks_are_of_one_size_so_that_a_compiled_form_makes_them_all(N, chunk, sizes):
    """Fewer tokens than a chunk, or a chunk and a half, must not fall to the eager form; a remainder does."""
    seen = []

    def compiled(x_NC, *rest):
        seen.append(len(x_NC))
        return loss.make_chunk_gradients(x_NC, *rest)

    x_NC, w_VC, targets_N = make(N, C=8, V=20)
    got = value_and_gradients(lambda x, w: chunked_loss_sum(x, w, targets_N, 15.0, 20, chunk, compiled), x_NC, w_VC)
    expected = value_and_gradients(lambda x, w: dense(x, w, targets_N, 15.0, "sum"), x_NC, w_VC)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert seen == sizes


# The choice of liger-kernel, by stand-ins: its kernels need a GPU.


def dense_sum(x_NC, w_VC, targets_N, cap, n_vocab):
    return dense(x_NC, w_VC, targets_N, cap, "sum", n_vocab)


def forgets_the_softcap(x_NC, w_VC, targets_N, cap, n_vocab):
    return dense(x_NC, w_VC, targets_N, 0.0, "sum", n_vocab)


def counts_ignored_targets(x_NC, w_VC, targets_N, cap, n_vocab):
    return dense(x_NC, w_VC, targets_N.clamp(min=0), cap, "sum", n_vocab)


def has_half_the_gradient(x_NC, w_VC, targets_N, cap, n_vocab):
    total = dense_sum(x_NC, w_VC, targets_N, cap, n_vocab)
    return total / 2 + total.detach() / 2


def counts_padding(x_NC, w_VC, targets_N, cap, n_vocab):
    return dense(x_NC, w_VC, targets_N, cap, "sum")


def is_not_installed(x_NC, w_VC, targets_N, cap, n_vocab):
    raise ImportError("No module named 'liger_kernel'")


@pytest.mark.parametrize(
    "form, reason",
    [
        (dense_sum, None),
        (forgets_the_softcap, "wrong results"),
        (counts_ignored_targets, "wrong results"),
        (has_half_the_gradient, "wrong results"),
        (counts_padding, "wrong results"),
        (is_not_installed, "No module named"),
    ],
)
def test_a_kernel_is_used_only_where_it_agrees_in_value_and_gradient(form, reason, capsys):
    assert kernels.loss_agrees(torch.device("cpu"), torch.float32, form) == (reason is None)
    assert (reason or "") in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_liger_is_refused_in_one_line_and_the_chunked_form_is_chosen(capsys):
    assert not kernels.loss_agrees(torch.device("cpu"), torch.float32, loss.liger_loss_sum)
    assert capsys.readouterr().out.count("\n") == 1
    assert kernels.choose_loss(torch.device("cpu"), torch.float32, False) == "eager"
    assert kernels.choose_loss(torch.device("cpu"), torch.float32, True) == "compiled"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_target_at_all_gives_zero_and_zero_gradients(reduction):
    x_NC, w_VC, targets_N = make(N=12, C=8, V=20, ignored=1.1)
    for result in value_and_gradients(lambda x, w: in_chunks(x, w, targets_N, 15.0, reduction, chunk=5), x_NC, w_VC):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("gradients", [True, False])
def test_every_negative_target_is_ignored(gradients):
    x_NC, w_VC, targets_N = make(N=12, C=8, V=20)
    x_NC.requires_grad_(gradients)
    elsewhere = torch.where(targets_N < 0, -100, targets_N)
    for reduction in ("mean", "sum", "none"):
        losses = [softcap_cross_entropy(x_NC, w_VC, t, 15.0, reduction) for t in (targets_N, elsewhere)]
        assert torch.equal(*losses)


def test_bf16_activations_with_fp32_weights_stay_close_to_fp32():
    x_NC, w_VC, targets_N = make(N=64, C=32, V=70)
    x_NC, w_VC = x_NC.bfloat16(), w_VC.bfloat16().float()
    loss, dx, dw = value_and_gradients(lambda x, w: in_chunks(x, w, targets_N, 15.0, "mean", chunk=16), x_NC, w_VC)
    expected, dx32, dw32 = value_and_gradients(lambda x, w: dense(x, w, targets_N, 15.0, "mean"), x_NC.float(), w_VC)
    assert (loss.dtype, dx.dtype, dw.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    assert (dx.float() - dx32).norm() < 0.03 * dx32.norm()
    assert (dw - dw32).norm() < 0.03 * dw32.norm()


def test_extreme_logits_stay_finite_and_capped():
    x_NC, w_VC, targets_N = make(N=10, C=4, V=20, scale=1e6)
    for result in value_and_gradients(lambda x, w: in_chunks(x, w, targets_N, 15.0, "mean", chunk=4), x_NC, w_VC):
        assert torch.isfinite(result).all()
    z = torch.linspace(-1e4, 1e4, 101)
    assert softcap(z, 15.0).abs().max() <= 15
    torch.testing.assert_close(softcap(z / 1e6, 15.0), z / 1e6, rtol=1e-4, atol=0)  # near zero it is the identity
    assert torch.equal(softcap(z, 0.0), z)
    with torch.inference_mode():  # another formula
        torch.testing.assert_close(softcap(z, 15.0), 15 * torch.tanh(z / 15))
        assert torch.equal(softcap(z, 0.0), z)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="average"):
        softcap_cross_entropy(*make(N=4, C=4, V=8), 15.0, "average")


class LargestTensor(TorchDispatchMode):
    """The most elements that any tensor made under it has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_full_logits_never_exist(reduction):
    N, C, V, chunk = 256, 8, 500, 32
    x_NC, w_VC, targets_N = make(N, C, V)
    with LargestTensor() as chunked:
        value_and_gradients(lambda x, w: in_chunks(x, w, targets_N, 15.0, reduction, chunk), x_NC, w_VC)
    with LargestTensor() as whole:
        value_and_gradients(lambda x, w: dense(x, w, targets_N, 15.0, reduction), x_NC, w_VC)
    assert whole.elements == N * V  # the measure sees what it looks for
    assert chunked.elements <= chunk * V
