"""Probes: may an optional kernel be used on this machine? Run it, and compare it with the plain definition.

A package that imports may still hold no kernel for this GPU, fail on launch, or return wrong gradients. So a kernel
is chosen only after one small forward and backward pass here has agreed with its oracle. Attention, the head's loss
and the fused MLP all choose this way, and fall back to plain PyTorch otherwise.
"""

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.inference_mode(False)
@torch.enable_grad()
def agrees(name: str, form: Callable[..., Tensor], oracle: Callable[..., Tensor], inputs: Sequence[Tensor]) -> bool:
    """Return whether `form(*inputs)` runs and gives the value and the gradients of `oracle(*inputs)`.

    Tolerated differences, relative to the largest entry of each result: 1e-4 in fp32, 5e-2 in shorter dtypes.
    Prints one line with the reason when it refuses; never raises.
    """
    tolerance = 1e-4 if inputs[0].dtype == torch.float32 else 5e-2
    try:
        expected = _value_and_gradients(oracle, inputs)
        got = _value_and_gradients(form, inputs)
    except Exception as error:  # a foreign kernel may raise anything, and all of it means "not this one"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"{name} refused: {reason}")
        return False
    for a, b in zip(expected, got, strict=True):
        # Written so that a NaN, which compares false with everything, is refused.
        if not (a - b).abs().max() <= tolerance * a.abs().max():
            print(f"{name} refused: wrong results")
            return False
    return True


def _value_and_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
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
