"""Kernels: which implementation of its hot spots a model runs with, on this machine.

A training step spends its time in four places: attention, the head's loss, the MLP, and what stands between the
products. Each has a plain form in PyTorch that is right everywhere. Faster ones exist for some machines, but a package
that imports may still hold no kernel for this GPU, fail on launch, or return wrong gradients. So `choose_kernels` takes
one only after a small forward and backward pass here has agreed with the plain form (`agrees`).

Another rank, or the same run when it is resumed, might choose otherwise. So rank 0 chooses once (`agreed_kernels` in
run.py), checkpoints record the names, and `load_kernels` makes kernels of them.

    attention.py    FlashAttention-3, FlexAttention, cuDNN | our blocks of queries on CPU | PyTorch's SDPA
    loss.py         the chunks compiled | liger-kernel | the chunks
    fused_mlp.py    our Triton kernel on Hopper | two products
    fp8.py          products in 8 bits, where --fp8 asks for them
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat import fp8
from nanochat.attention import Attend, attend, attend_blocks, attend_naive, attend_sdpa, cudnn, flash3, flex, padded
from nanochat.common import print0
from nanochat.compute import can_compile, pick_dtype
from nanochat.fused_mlp import eager_mlp, fused_mlp, has_kernel
from nanochat.loss import (
    CUDA_CHUNK_COMPILED,
    IGNORED,
    LossSum,
    chunked_loss_sum,
    liger_loss_sum,
    make_chunk_gradients,
)

Record = dict[str, Any]  # of the kernels that were chosen, for checkpoints: see Kernels.record


@dataclass(frozen=True)
class Kernels:
    """The implementations that a model runs with. None changes the mathematics, and the defaults work on any device."""

    attention: str = "plain"  # name of `attend`
    loss: str = "plain"  # name of `loss_sum`
    fused_mlp: bool = False  # the MLP by one Triton kernel
    fp8: bool = False  # the blocks' products in 8 bits, in training only; the head's are up to loss_sum
    compiled: bool = False  # torch.compile fuses what stands between the products of a block
    attend: Attend = attend
    loss_sum: LossSum = chunked_loss_sum

    @property
    def record(self) -> Record:
        """The choice by names, for checkpoints and other ranks: `load_kernels` makes the same kernels of it again."""
        return {
            "attention": self.attention,
            "loss": self.loss,
            "fused_mlp": self.fused_mlp,
            "fp8": self.fp8,
            "compiled": self.compiled,
        }

    @property
    def names(self) -> list[str]:
        """The kernels in words, for the log."""
        words = [f"attention {self.attention}", f"loss {self.loss}", "compiled" if self.compiled else "eager"]
        if self.fused_mlp:
            words.append("MLP fused")
        if self.fp8:
            words.append("fp8")
        return words


PLAIN = Kernels()


def choose_kernels(
    device: torch.device,
    *,
    width: int,
    head_dim: int,
    windowed: bool,
    compiled: bool = False,
    fp8_products: bool = False,
    recorded: Record | None = None,
) -> Kernels:
    """Return the fastest kernels to train with that work on this device. On CUDA that takes seconds: ask once per run.

    width: channels of the model. windowed: some layers have attention windows. compiled: use torch.compile, if it works
    here. recorded: the kernels that a resumed run began with. They are kept where they still work: timing might
    choose others today, and other kernels round differently.
    Raises ValueError for training in float16, and where fp8 is asked for and cannot work.
    """
    dtype = pick_dtype(device)
    if dtype == torch.float16:  # without loss scaling its gradients would underflow
        raise ValueError("NANOCHAT_DTYPE=float16 is for inference only: train in bfloat16 or float32")
    if compiled and not can_compile(device):
        print0("torch.compile is off: no C++ compiler (installing g++ makes training faster)")
        compiled = False
    if fp8_products:
        fp8.check(device, width)
    before = recorded or {}
    record = {
        "attention": choose_attention(device, dtype, head_dim, windowed, before.get("attention")),
        "loss": "fp8" if fp8_products else choose_loss(device, dtype, compiled, before.get("loss")),
        "fused_mlp": False,
        "fp8": fp8_products,
        "compiled": compiled,
    }
    if compiled and not fp8_products:
        record["fused_mlp"] = fused_mlp_pays(device, dtype, width, before.get("fused_mlp"))
    if recorded and recorded != record:
        print0(f"flags or machine have changed: the run began with kernels {recorded}, and goes on with {record}")
    return load_kernels(record, device)


def load_kernels(record: Record, device: torch.device) -> Kernels:
    """Return the kernels of a record. Raises ValueError where one of them is not installed."""
    try:
        attend_rows = load_attention(record["attention"], device)
    except ImportError as error:
        raise ValueError(f"attention by {record['attention']} is not installed on every machine: {error}") from error
    loss_sum = load_loss(record["loss"], device, record["compiled"])
    return Kernels(**record, attend=attend_rows, loss_sum=loss_sum)


# --- attention


def choose_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, windowed: bool, recorded: str | None = None
) -> str:
    """Return the name of the fastest form of attention that works on this device, or of the recorded one if it does."""
    names = attention_names(device, windowed)
    if recorded in names:
        names.insert(0, recorded)
    name = next(name for name in names if attention_works(name, device, dtype, head_dim, windowed))
    if is_hopper(device) and name != "flash-attention-3":
        print0(
            "ATTENTION RUNS WITHOUT FLASHATTENTION-3 on this Hopper GPU, and training 4 % slower: pip install kernels"
        )
    return name


def attention_names(device: torch.device, windowed: bool) -> list[str]:
    """Return the forms of attention for a device, the fastest first. The last one needs no probe."""
    if device.type == "cpu":
        return ["blocks"]
    if device.type == "cuda" and windowed:
        return ["flash-attention-3", "flex and cudnn", "flex and sdpa", "sdpa"]
    if device.type == "cuda":
        return ["flash-attention-3", "cudnn", "sdpa"]
    return ["sdpa"]


def load_attention(name: str, device: torch.device) -> Attend:
    """Return a form of attention by its name. Raises ImportError where it is not installed."""
    if name == "blocks":
        return attend_blocks
    if name == "flash-attention-3":
        return flash3()
    if name == "cudnn":
        return padded(cudnn())
    if name == "sdpa":
        return padded(attend_sdpa) if device.type == "cuda" else attend_sdpa

    # FlexAttention for windows, and the other one for full attention.
    attend_windows = flex()
    attend_full = cudnn() if name == "flex and cudnn" else attend_sdpa

    def attend_either(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int) -> Tensor:
        if window >= q_BTHD.size(1):
            return attend_full(q_BTHD, k_BTKD, v_BTKD, window)
        return attend_windows(q_BTHD, k_BTKD, v_BTKD, window)

    return padded(attend_either)


def is_hopper(device: torch.device) -> bool:
    """Return whether FlashAttention-3 has kernels for this device: it is made for Hopper GPUs alone."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def attention_works(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, windowed: bool) -> bool:
    """Return whether a form of attention can be loaded and agrees with the definition, also for windows if asked."""
    if name in ("blocks", "sdpa"):  # our own and PyTorch's: they work everywhere
        return True
    try:
        kernel = load_attention(name, device)
    except Exception as error:  # not installed, no network, or no build for this GPU, Python or PyTorch
        refuse(f"attention by {name}", error)
        return False
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 300, heads, head_dim, generator=generator).to(device, dtype) for heads in (4, 2, 2)]
    short = 128
    whole = 512  # covers the probe's 300 positions
    windows = (short, whole) if windowed else (whole,)
    return all(agrees(f"attention by {name}", kernel, attend_naive, qkv, window) for window in windows)


# --- loss


def choose_loss(device: torch.device, dtype: torch.dtype, compiled: bool, recorded: str | None = None) -> str:
    """Return the name of the form of the summed loss to train with; `recorded` is kept if it is not compiled either.

    compiled: have torch.compile fuse the elementwise work of a chunk. liger-kernel reads and writes the logits as
    often, but its chunks of 2,048 tokens add to the gradient of W in fp32 eight times as often: at d24 14 GB more of
    memory traffic in a micro-step (counted, not measured). It is for where nothing is compiled.
    """
    if compiled:
        return "compiled"
    if device.type == "cuda" and recorded != "eager" and loss_agrees(device, dtype, liger_loss_sum):
        return "liger"
    return "eager"


def load_loss(name: str, device: torch.device, compiled: bool) -> LossSum:
    """Return a form of the summed loss by its name."""
    if name == "fp8":
        return functools.partial(fp8.fp8_loss_sum, compiled=compiled)
    if name == "compiled":
        fused = torch.compile(make_chunk_gradients, dynamic=False)
        chunk = CUDA_CHUNK_COMPILED if device.type == "cuda" else None
        return functools.partial(chunked_loss_sum, chunk=chunk, chunk_gradients=fused)
    return liger_loss_sum if name == "liger" else chunked_loss_sum


def loss_agrees(device: torch.device, dtype: torch.dtype, form: LossSum) -> bool:
    """Return whether `form` gives the value and gradients of `chunked_loss_sum` here, ignored targets included."""
    generator = torch.Generator().manual_seed(0)
    n_vocab = 70
    targets_N = torch.randint(0, n_vocab, (32,), generator=generator)
    targets_N[::3] = IGNORED
    targets_N = targets_N.to(device)
    x_NC = torch.randn(32, 16, generator=generator).to(device, dtype)
    w_VC = torch.randn(128, 16, generator=generator).to(device, dtype)  # padded
    cap = 15.0
    return agrees("liger-kernel's cross-entropy", form, chunked_loss_sum, [x_NC, w_VC], targets_N, cap, n_vocab)


# --- MLP


@torch.inference_mode(False)
@torch.enable_grad()
def fused_mlp_pays(device: torch.device, dtype: torch.dtype, width: int, recorded: bool | None = None) -> bool:
    """Return whether `fused_mlp` is right on this device and, at this width, not slower than the compiled definition.

    recorded: whether it was found faster before, which is not timed again. False without Triton, without a Hopper GPU
    or later, and for fp32.
    """
    if not has_kernel(device) or dtype.itemsize != 2 or recorded is False:
        return False
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for shape in ((8192, width), (4 * width, width), (width, 4 * width)):
        x = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        inputs.append(x.to(device, dtype).requires_grad_())
    if not agrees("fused MLP", fused_mlp, eager_mlp, inputs):
        return False
    if recorded:
        return True
    compiled_mlp = torch.compile(eager_mlp, dynamic=False)
    fused_ms = milliseconds(lambda: torch.autograd.grad(fused_mlp(*inputs), inputs, inputs[0]))
    compiled_ms = milliseconds(lambda: torch.autograd.grad(compiled_mlp(*inputs), inputs, inputs[0]))
    return fused_ms <= compiled_ms


# --- the probe


@torch.inference_mode(False)
@torch.enable_grad()
def agrees(
    name: str, form: Callable[..., Tensor], oracle: Callable[..., Tensor], inputs: Sequence[Tensor], *constants: Any
) -> bool:
    """Return whether `form(*inputs, *constants)` runs and gives what `oracle` gives, and the gradients by the inputs.

    Tolerated differences, relative to the largest entry of each result: 1e-4 in fp32, 5e-2 in shorter dtypes.
    Prints one line with the reason when it refuses; never raises.
    """
    tolerance = 1e-4 if inputs[0].dtype == torch.float32 else 5e-2
    try:
        expected = value_and_gradients(oracle, inputs, constants)
        got = value_and_gradients(form, inputs, constants)
    except Exception as error:  # a foreign kernel may raise anything, and all of it means "not this one"
        refuse(name, error)
        return False
    for a, b in zip(expected, got, strict=True):
        # Written so that a NaN, which compares false with everything, is refused.
        if not (a - b).abs().max() <= tolerance * a.abs().max():
            refuse(name, "wrong results")
            return False
    return True


def refuse(name: str, reason: Exception | str) -> None:
    """Print one line that says why a kernel is not used."""
    text = str(reason) or type(reason).__name__
    print(f"{name} refused: {text.splitlines()[0]}")


def value_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], constants: Sequence[Any]
) -> list[Tensor]:
    """Return the output in fp32, and the gradients of the sum of its squares by the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves, *constants)
    # The square gives every entry of the output a weight of its own, so that errors do not cancel in the sum.
    gradients = torch.autograd.grad(y.float().square().sum(), leaves)
    return [y.detach().float()] + [gradient.float() for gradient in gradients]


def milliseconds(run: Callable[[], object]) -> float:
    """Return the median time of ten calls of `run` on a GPU, after three to warm up."""
    times = []
    for _ in range(13):
        began = torch.cuda.Event(enable_timing=True)
        ended = torch.cuda.Event(enable_timing=True)
        began.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return statistics.median(times[3:])
