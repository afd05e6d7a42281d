"""Parts 1 and 2 of dev/gpu_check.py: what this GPU can do at best, and each kernel at the shapes of training.

A kernel's value and gradients are set against its definition, computed in fp32 from the same inputs. An error is the
norm of the difference over the norm of what is right: 1e-3 to 1e-2 is bf16's rounding, a few 1e-2 fp8's. Its time is
that of a forward and a backward pass, and its share that of the best product, or of the bandwidth, of part 1.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dev.bench_plan import polar_flops
from dev.gpu_bench import Bench, Check, Row
from dev.measure import milliseconds, time_product
from nanochat import attention, fp8, fused_mlp, loss
from nanochat.gpt import norm
from nanochat.optim import adamw_update, muon_update

# --- 1. ceilings


def ceilings(bench: Bench) -> list[Check]:
    """List the checks of part 1."""
    return [
        Check("bf16 products", bf16_products),
        Check("fp8 products", fp8_products),
        Check("memory", memory),
    ]


def product_shapes(bench: Bench) -> list[tuple[int, int, int]]:
    """Return a square product, and those of the larger model's MLP: forward there and back, and a gradient."""
    sizes = bench.sizes
    C = sizes.model(sizes.fp8_depth).n_embd
    N = sizes.fp8_rows * sizes.sequence_len
    return [(sizes.square,) * 3, (N, C, 4 * C), (N, 4 * C, C), (4 * C, N, C)]


def bf16_products(bench: Bench) -> Iterator[Row]:
    """Measure products in the compute dtype."""
    for shape in product_shapes(bench):
        yield product_row(bench, "bf16", shape, time_product(*shape, bench.compute))


def fp8_products(bench: Bench) -> Iterator[Row]:
    """Measure products in fp8."""
    for M, K, N in product_shapes(bench):
        a_MK, a_scale = fp8.quantise(torch.randn(M, K, device=bench.device), torch.float8_e4m3fn)
        b_NK, b_scale = fp8.quantise(torch.randn(N, K, device=bench.device), torch.float8_e4m3fn)
        product = functools.partial(
            torch._scaled_mm,
            a_MK,
            b_NK.t(),
            a_scale,
            b_scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        ms = milliseconds(product, bench.device)
        yield product_row(bench, "fp8", (M, K, N), 2 * M * K * N / ms * 1e3)


def product_row(bench: Bench, dtype: str, shape: tuple[int, int, int], rate: float) -> Row:
    """Return the row of a product, and remember the best rate of its dtype."""
    bench.ceilings[dtype] = max(rate, bench.ceilings.get(dtype, 0.0))
    M, K, N = shape
    return {"row": f"{dtype} {M}x{K}x{N}", "ms": 2e3 * M * K * N / rate, "TFLOP/s": rate / 1e12}


def memory(bench: Bench) -> Iterator[Row]:
    """Measure how fast memory is copied, counting bytes read and bytes written, and how fast it is read."""
    source = torch.randint(1000, (bench.sizes.copied // 4,), dtype=torch.int32, device=bench.device)
    target = torch.empty_like(source)
    for name, n_bytes, call in (
        ("copy", 2 * source.nbytes, lambda: target.copy_(source)),
        ("read", source.nbytes, source.amax),
    ):
        ms = milliseconds(call, bench.device)
        rate = n_bytes / ms * 1e3
        bench.ceilings["memory"] = max(rate, bench.ceilings.get("memory", 0.0))
        yield {"row": f"memory, {name}", "ms": ms, "TB/s": rate / 1e12}


# --- 2. kernels


def kernels(bench: Bench) -> list[Check]:
    """List the checks of part 2: those that training chooses among on this kind of device."""
    sizes = bench.sizes
    short = min(sizes.model(sizes.depth).windows)
    long = sizes.sequence_len
    if bench.on_gpu:
        forms = {
            "flash-attention-3": (attention.flash3, (long, short)),
            "flex": (attention.flex, (short,)),
            "cudnn": (attention.cudnn, (long,)),
            "sdpa": (lambda: attention.attend_sdpa, (long, short)),
        }
    else:
        forms = {
            "blocks": (lambda: attention.attend_blocks, (long, short)),
            "sdpa": (lambda: attention.attend_sdpa, (long, short)),
        }
    checks = []
    for name, (load, windows) in forms.items():
        for window in windows:
            measure = functools.partial(attention_row, load=load, window=window)
            checks.append(Check(f"attention {name}, window {window}", measure))
    checks.append(Check("head's loss, compiled", compiled_loss))
    checks.append(Check("head's loss, fp8", fp8_loss))
    if bench.on_gpu:
        checks.append(Check("head's loss, liger", liger_loss))
        checks.append(Check("MLP, fused", fused_mlp_row))
    checks.append(Check("MLP, compiled", compiled_mlp))
    checks.append(Check("fp8 linear", fp8_linears))
    checks.append(Check("norm", norm_row))
    checks.append(Check("Muon", muon_row))
    checks.append(Check("AdamW", adamw_row))
    return checks


def random_tensors(bench: Bench, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Return normal numbers in the compute dtype."""
    generator = torch.Generator(bench.device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=bench.device).to(bench.compute.dtype) for shape in shapes]


def judge(
    bench: Bench,
    form: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *,
    work: float,
    ceiling: str = "bf16",
) -> Row:
    """Compare a form with its definition in fp32, and time a forward and a backward pass of it.

    work: FLOPs of both passes, or with the ceiling "memory" bytes.
    """
    leaves = [x.clone().requires_grad_() for x in inputs]
    dy = torch.randn_like(form(*leaves).detach())

    def both_passes(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    got = both_passes(form, leaves)
    with exact_products():
        expected = both_passes(definition, [x.float().requires_grad_() for x in inputs])
    errors = [relative_error(a, b) for a, b in zip(got, expected, strict=True)]
    del got, expected
    ms = milliseconds(lambda: both_passes(form, leaves), bench.device)
    row = {"ms": ms, "error": errors[0], "gradient error": max(errors[1:])}
    return {**row, **rate_of(bench, work, ms, ceiling)}


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Multiply fp32 matrices in fp32, not in tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of what is expected."""
    with torch.no_grad():
        return float((got.float() - expected).norm() / expected.norm())


def rate_of(bench: Bench, work: float, ms: float, ceiling: str) -> Row:
    """Return the rate of so many FLOPs, or bytes, in so many milliseconds, and its share of the ceiling."""
    rate = work / ms * 1e3
    unit = "TB/s" if ceiling == "memory" else "TFLOP/s"
    return {unit: rate / 1e12, "share": bench.share(ceiling, rate)}


def attention_row(bench: Bench, load: Callable[[], attention.Attend], window: int) -> list[Row]:
    """Measure a form of attention on a micro-batch of the smaller model; those of the larger have as many heads."""
    model = bench.sizes.model(bench.sizes.depth)
    B = bench.sizes.rows
    T = bench.sizes.sequence_len
    H = model.n_head
    D = model.head_dim
    seen = sum(min(t + 1, window) for t in range(T))  # pairs of a query and a key that it sees
    row = judge(
        bench,
        functools.partial(load(), window=window),
        functools.partial(attention.attend_naive, window=window),
        random_tensors(bench, (B, T, H, D), (B, T, H, D), (B, T, H, D)),
        work=3.5 * 4 * B * H * D * seen,  # two products forward, five backward
    )
    return [row]


def loss_row(bench: Bench, form: loss.LossSum, depth: int, rows: int, ceiling: str = "bf16") -> list[Row]:
    """Measure a form of the head's loss on a micro-batch."""
    model = bench.sizes.model(depth)
    N = rows * bench.sizes.sequence_len
    C = model.n_embd
    V = model.padded_vocab_size
    generator = torch.Generator(bench.device).manual_seed(0)
    targets_N = torch.randint(model.vocab_size, (N,), generator=generator, device=bench.device)
    constants = (targets_N, model.softcap, model.vocab_size)
    x_NC, w_VC = random_tensors(bench, (N, C), (V, C))
    row = judge(
        bench,
        lambda x, w: form(x, w, *constants),
        lambda x, w: loss.chunked_loss_sum(x, w, *constants),
        [x_NC, w_VC / C**0.5],
        work=6 * N * C * V,
        ceiling=ceiling,
    )
    return [row]


def compiled_loss(bench: Bench) -> list[Row]:
    form = functools.partial(
        loss.chunked_loss_sum,
        chunk=loss.CUDA_CHUNK_COMPILED,
        chunk_gradients=bench.compiled(loss.make_chunk_gradients),
    )
    return loss_row(bench, form, bench.sizes.depth, bench.sizes.rows)


def liger_loss(bench: Bench) -> list[Row]:
    return loss_row(bench, loss.liger_loss_sum, bench.sizes.depth, bench.sizes.rows)


def fp8_loss(bench: Bench) -> list[Row]:
    form = functools.partial(fp8.fp8_loss_sum, compiled=bench.on_gpu)
    return loss_row(bench, form, bench.sizes.fp8_depth, bench.sizes.fp8_rows, ceiling="fp8")


def mlp_row(bench: Bench, form: Callable[..., Tensor]) -> list[Row]:
    """Measure a form of the smaller model's MLP."""
    N = bench.sizes.rows * bench.sizes.sequence_len
    C = bench.sizes.model(bench.sizes.depth).n_embd
    x_NC, up_HC, down_CH = random_tensors(bench, (N, C), (4 * C, C), (C, 4 * C))
    inputs = [x_NC, up_HC / C**0.5, down_CH / (4 * C) ** 0.5]
    return [judge(bench, form, fused_mlp.eager_mlp, inputs, work=6 * N * 8 * C * C)]


def fused_mlp_row(bench: Bench) -> list[Row]:
    return mlp_row(bench, fused_mlp.fused_mlp)


def compiled_mlp(bench: Bench) -> list[Row]:
    return mlp_row(bench, bench.compiled(fused_mlp.eager_mlp))


def fp8_linears(bench: Bench) -> Iterator[Row]:
    """Measure the products of a block of the larger model in fp8, with weights quantised before, and in bf16."""
    N = bench.sizes.fp8_rows * bench.sizes.sequence_len
    C = bench.sizes.model(bench.sizes.fp8_depth).n_embd
    in_fp8 = bench.compiled(fp8.linear)
    for name, n_in, n_out in (("q, k, v", C, 3 * C), ("up", C, 4 * C), ("down", 4 * C, C)):
        inputs = random_tensors(bench, (N, n_in), (n_out, n_in))
        quantised = fp8.quantise_weights(inputs[1:])
        work = 6 * N * n_in * n_out
        short = judge(
            bench,
            functools.partial(in_fp8, quantised=quantised),
            F.linear,
            inputs,
            work=work,
            ceiling="fp8",
        )
        plain = judge(bench, F.linear, F.linear, inputs, work=work)
        yield {"row": f"fp8 linear, {name}", **short, "in bf16 ms": plain["ms"]}


def norm_row(bench: Bench) -> list[Row]:
    """Measure the norm of a step's residual: for a micro-batch, a GPU would be faster than Python launches kernels."""
    N = bench.sizes.micro_batches * bench.sizes.fp8_rows * bench.sizes.sequence_len
    C = bench.sizes.model(bench.sizes.fp8_depth).n_embd
    (x_NC,) = random_tensors(bench, (N, C))
    work = 5 * x_NC.nbytes  # x is read and y written; then x and dy are read and dx is written
    return [judge(bench, bench.compiled(norm), norm, [x_NC], work=work, ceiling="memory")]


def muon_row(bench: Bench) -> list[Row]:
    """Measure Muon on the wide matrices of all MLPs of the smaller model."""
    K = bench.sizes.depth
    C = bench.sizes.model(K).n_embd
    w_KMN, g_KMN = random_tensors(bench, (K, 4 * C, C), (K, 4 * C, C))
    w_KMN = w_KMN.float() / C**0.5  # as large as weights are
    g_KMN = g_KMN.float()
    state = [torch.zeros_like(g_KMN), torch.zeros_like(g_KMN[..., :1])]
    work = 5 * K * polar_flops(4 * C, C)
    row = judge_update(
        bench,
        muon_update,
        [w_KMN, g_KMN, *state],
        rates={"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1},
        constants={"dtype": torch.bfloat16},
        exact={"dtype": torch.float32},
        work=work,
        ceiling="bf16",
    )
    return [row]


def adamw_row(bench: Bench) -> list[Row]:
    """Measure AdamW on an embedding of the larger model."""
    model = bench.sizes.model(bench.sizes.fp8_depth)
    shape = (model.padded_vocab_size, model.n_embd)
    w_VC, g_VC = random_tensors(bench, shape, shape)
    state = [torch.zeros(shape, device=bench.device), torch.zeros(shape, device=bench.device)]
    constants = {"betas": (0.8, 0.995), "weight_decay": 0.01}
    row = judge_update(
        bench,
        adamw_update,
        [w_VC, g_VC, *state],
        rates={"step": 10.0, "lr": 0.1},
        constants=constants,
        exact=constants,
        # The gradient is read, and the weight and two averages in fp32 are read and written.
        work=3 * w_VC.nbytes + 4 * state[0].nbytes,
        ceiling="memory",
    )
    return [row]


def judge_update(
    bench: Bench,
    update: Callable[..., None],
    tensors: list[Tensor],
    *,
    rates: dict[str, float],
    constants: dict[str, Any],
    exact: dict[str, Any],
    work: float,
    ceiling: str,
) -> Row:
    """Compare an update, as the optimizer makes it, with itself in fp32, and time it.

    tensors: the weights, which it changes, and what it reads or changes beside them. rates: what changes from step to
    step. constants: what does not, and `exact` in their place for the update in fp32. The error is that of the weights'
    change.
    """
    before = tensors[0].float()
    expected = before.clone()
    with exact_products():
        update(expected, *(x.clone() for x in tensors[1:]), **rates, **exact)

    compiled = bench.compiled(update)
    numbers = {name: torch.tensor(value) if bench.on_gpu else value for name, value in rates.items()}
    got = tensors[0].clone()
    compiled(got, *(x.clone() for x in tensors[1:]), **numbers, **constants)
    error = relative_error(got - before, expected - before)
    ms = milliseconds(lambda: compiled(*tensors, **numbers, **constants), bench.device)
    return {"ms": ms, "error": error, **rate_of(bench, work, ms, ceiling)}
