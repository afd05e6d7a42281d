"""Weights laid out for decoding: `prepack(model)` gives the same model, of any family, with faster matrix products.

Decoding one token reads every weight once and does almost nothing else, so it is bound by memory and by the number of
operations. Three things help. All of them are about how weights are stored; the forward stays the same:

1. Weights are rounded to the compute dtype once, not at each use (training keeps them in fp32).
2. Matrices that read the same input (q, k and v; gate and up) become one product.
3. On CPU the matrices lie in the blocked layout that oneDNN wants, or in 8 bits.

Measured on two cores (dev/LOG.md): the packed model decodes two to three times as fast as the plain one.

Each Linear is replaced by one of three products: PlainProduct, OnednnProduct or Int8Product. On CPU a row's result has
the same bits whatever rows stand beside it, so that answers do not depend on their company (engine.py).

Shapes: N tokens of any rows, C inputs, O outputs.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nanochat.language_model import Gate, LanguageModel, Linear, Together

SINGLE = 1 << 24  # weights: a d4 has 4 million of them and gains nothing from a second thread, a d12 has 88 million
SMALL = 1 << 31  # bytes: on a GPU, models below this are bound by launches, and a second copy of them has room


class PlainProduct(nn.Module):
    """x·Wᵀ + b by PyTorch's own product.

    On CPU its sums depend on the number of rows, unless that is a multiple of eight.
    """

    def __init__(self, weight_OC: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = weight_OC
        self.bias_O = bias_O
        self.pads = weight_OC.device.type == "cpu"

    def forward(self, x_NC: torch.Tensor) -> torch.Tensor:
        if not self.pads:
            return F.linear(x_NC, self.weight, self.bias_O)
        padded_NC = F.pad(x_NC, (0, 0, 0, -len(x_NC) % 8))
        return F.linear(padded_NC, self.weight, self.bias_O)[: len(x_NC)]


class OnednnProduct(nn.Module):
    """x·Wᵀ + b by oneDNN, with the weights blocked beforehand.

    A row's sums do not depend on the others, except that in fp32 a single row is summed in another order than several.
    """

    def __init__(self, weight_OC: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OC.contiguous(), 16)
        self.bias_O = bias_O
        self.two_rows = weight_OC.dtype == torch.float32

    def forward(self, x_NC: torch.Tensor) -> torch.Tensor:
        return _onednn(x_NC, self.weight, self.bias_O, self.two_rows)


# A script inside of a trace (cpu_trace.py): the tracer alone would record one of the two branches only.
@torch.jit.script_if_tracing
def _onednn(x_NC: torch.Tensor, weight: torch.Tensor, bias_O: torch.Tensor | None, two_rows: bool) -> torch.Tensor:
    if two_rows and x_NC.size(0) == 1:
        return torch.ops.mkldnn._linear_pointwise(x_NC.expand(2, -1), weight, bias_O, "none", [], "")[:1]
    return torch.ops.mkldnn._linear_pointwise(x_NC, weight, bias_O, "none", [], "")


class Int8Product(nn.Module):
    """x·Wᵀ + b with weights in 8 bits and a scale for each output; activations stay in bf16.

    A row's sums do not depend on the others.
    """

    def __init__(self, weight_OC: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        largest_O = weight_OC.float().abs().amax(dim=1).clamp(min=1e-12)
        self.scale_O = (largest_O / 127).to(weight_OC.dtype)
        steps_OC = (weight_OC.float() / self.scale_O.float()[:, None]).round()
        self.weight = steps_OC.clamp(-127, 127).to(torch.int8)
        self.bias_O = bias_O

    def forward(self, x_NC: torch.Tensor) -> torch.Tensor:
        y_NO = torch._weight_int8pack_mm(x_NC, self.weight, self.scale_O)
        return y_NO if self.bias_O is None else y_NO + self.bias_O


class PackedTogether(nn.Module):
    """Takes the place of a `Together`: one product, whose outputs are split into those of each group."""

    def __init__(self, product: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.product = product
        self.sizes = list(sizes)

    def forward(self, x_NC: torch.Tensor) -> Sequence[torch.Tensor]:
        y_NO = self.product(x_NC)
        return y_NO.split(self.sizes, dim=-1) if len(self.sizes) > 1 else (y_NO,)


class PackedGate(nn.Module):
    """Takes the place of a `Gate` that is a product of its own: one with an output more, which is cut off.

    Otherwise the sigmoid that follows would depend on the number of rows. PyTorch computes it for whole vectors by
    another formula than for the numbers that are left over, so a column of numbers would get other bits the longer it
    is. A column with gaps in memory is never read as vectors.
    """

    def __init__(self, product: nn.Module, gate: Gate) -> None:
        super().__init__()
        self.product = product
        self.n_in = gate.in_features
        self.n_out = gate.out_features

    def forward(self, x_NC: torch.Tensor) -> torch.Tensor:
        return self.product(x_NC[:, : self.n_in])[:, : self.n_out]


def onednn_works(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies in this dtype here, and gives what PyTorch's own product gives."""
    if dtype == torch.float16:
        return False  # it runs, but several times slower than PyTorch's own
    weight_OC = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    x_NC = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    try:
        y_NO = OnednnProduct(weight_OC, None)(x_NC)
    except (RuntimeError, AttributeError):  # a build of PyTorch without oneDNN, or a CPU without the instructions
        return False
    return torch.allclose(y_NO.float(), F.linear(x_NC.float(), weight_OC.float()), atol=0.1, rtol=0.02)


def decode_threads(model: LanguageModel) -> int:
    """Return how many CPU threads decoding gains from; a script that only generates passes it to set_num_threads.

    A model below SINGLE weights is bound by the number of operations. A second thread gains it nothing, and costs most
    of its speed when other programs use the cores, because threads that wait for each other spin (dev/LOG.md).
    """
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, Linear))
    return 1 if weights < SINGLE else torch.get_num_threads()


@torch.inference_mode()
def prepack(model: LanguageModel, *, int8: bool = False) -> Any:
    """Return `model` for inference, its weights as they are now; `model` itself stays as it is, and may train on.

    Embeddings, norms and scalars are shared with `model`, not copied. Where nothing is gained (large models on a GPU,
    models that are spread over devices or ranks) it returns `model` itself. int8: matrices in 8 bits; raises
    ValueError unless the model is in bf16 on CPU.
    """
    on_cpu = model.device.type == "cpu"
    int8_works = on_cpu and model.whole and model.dtype == torch.bfloat16 and model.config.n_embd % 16 == 0
    if int8 and not int8_works:
        raise ValueError("int8 weights need a CPU, NANOCHAT_DTYPE=bfloat16, and a width that 16 divides")
    if not model.whole:
        return model
    if not on_cpu and sum(weight.nbytes for weight in model.parameters()) >= SMALL:
        return model
    onednn = on_cpu and onednn_works(model.dtype)

    def pack(matrices: Sequence[Any], extra_outputs: int = 0) -> nn.Module:
        weight_OC = F.pad(_stack_weights(matrices, model.dtype), (0, 0, 0, extra_outputs))
        bias_O = _stack_biases(matrices, model.dtype)
        # A gate has too few inputs for 8 bits, and too few weights to matter.
        if int8 and weight_OC.size(1) % 16 == 0:
            return Int8Product(weight_OC, bias_O)
        if onednn:
            return OnednnProduct(weight_OC, bias_O)
        return PlainProduct(weight_OC, bias_O)

    packed = _copy_modules(model).eval()
    # First the matrices that read the same input, then all others.
    taken: set[nn.Module] = set()
    for module in list(packed.modules()):
        for name, value in list(vars(module).items()):
            if not isinstance(value, Together):
                continue
            matrices: list[Any] = []
            sizes: list[int] = []
            for group in value.groups:
                matrices += group
                sizes.append(sum(len(matrix.weight) for matrix in group))
            setattr(module, name, PackedTogether(pack(matrices), sizes))
            taken.update(matrices)
    for module in list(packed.modules()):
        for name, child in list(module.named_children()):
            if child in taken:
                delattr(module, name)
            elif isinstance(child, Gate):
                setattr(module, name, PackedGate(pack([child], extra_outputs=1), child))
            elif isinstance(child, Linear):
                setattr(module, name, pack([child]))
    return packed


def _copy_modules(model: nn.Module) -> Any:
    """Return a copy of the modules of `model`, which shares its tensors."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for weight in model.parameters():
        # The same memory without a gradient, which a trace takes as a constant.
        memo[id(weight)] = nn.Parameter(weight.detach(), requires_grad=False)
    return copy.deepcopy(model, memo)


def _stack_weights(matrices: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
    """Return the weights (O, C) of matrices that read the same input, one below the other."""
    weights = [matrix.weight.detach().to(dtype) for matrix in matrices]
    n_in = max(weight_OC.size(1) for weight_OC in weights)
    # A gate reads the first channels only: zeros for the others.
    return torch.cat([F.pad(weight_OC, (0, n_in - weight_OC.size(1))) for weight_OC in weights])


def _stack_biases(matrices: Sequence[Any], dtype: torch.dtype) -> torch.Tensor | None:
    biases = [matrix.bias.detach().to(dtype) for matrix in matrices if matrix.bias is not None]
    assert len(biases) in (0, len(matrices)), "matrices with and without bias cannot be one product"
    return torch.cat(biases) if biases else None
