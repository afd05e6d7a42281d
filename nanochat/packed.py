"""Weights laid out for decoding: `prepack(model)` gives the same model, of any family, with faster matrix products.

Decoding one token reads every weight once and does almost nothing else, so it is bound by memory and by the number of
operations. Three things help, and all of them are a matter of how weights are stored, not of another forward:

1. Weights are rounded to the compute dtype once, not at each use (training keeps them in fp32).
2. Matrices that read the same input (q, k and v; gate and up) become one product.
3. On CPU the matrices lie in the blocked layout that oneDNN wants, or in 8 bits.

Measured on two cores (dev/LOG.md): the packed model decodes two to three times as fast as the plain one.

Shapes: N tokens of any rows, C inputs, O outputs.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from nanochat.language_model import Gate, LanguageModel, Linear, Together

Form = Literal["plain", "onednn", "int8"]
SINGLE = 1 << 24  # weights: a d4 has 4 million of them and gains nothing from a second thread, a d12 has 88 million
SMALL = 1 << 31  # bytes: on a GPU, models below this are bound by launches, and a second copy of them has room


@torch.jit.script_if_tracing  # the tracer alone cannot write down a list of optional numbers (cpu_trace.py)
def _onednn(x_NC: torch.Tensor, weight: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_NC, weight, bias_O, "none", [], "")


@torch.jit.script_if_tracing
def _onednn_two_rows(x_NC: torch.Tensor, weight: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    if x_NC.size(0) == 1:
        return torch.ops.mkldnn._linear_pointwise(x_NC.expand(2, -1), weight, bias_O, "none", [], "")[:1]
    return torch.ops.mkldnn._linear_pointwise(x_NC, weight, bias_O, "none", [], "")


class PackedLinear(nn.Module):
    """x·Wᵀ + b for rows x_NC.

    plain: PyTorch's product. onednn: oneDNN's, with the weights blocked beforehand. int8: weights in 8 bits with a
    scale for each output, activations in bf16.
    deterministic: on CPU a row's result has the same bits whatever rows stand beside it. int8 is so by nature, as is
    oneDNN in bf16, and in fp32 from two rows on; PyTorch's own is where the rows are a multiple of eight.
    """

    def __init__(
        self, weight_OC: torch.Tensor, bias_O: torch.Tensor | None, form: Form, deterministic: bool = True
    ) -> None:
        super().__init__()
        self.form = form
        self.rows = 1  # the number of rows is padded to a multiple of this
        self.scale_O = None
        self.bias_O = bias_O
        on_cpu = weight_OC.device.type == "cpu"
        if form == "int8":
            scale_O = (weight_OC.float().abs().amax(dim=1).clamp(min=1e-12) / 127).to(weight_OC.dtype)
            steps_OC = (weight_OC.float() / scale_O.float()[:, None]).round()
            self.weight = steps_OC.clamp(-127, 127).to(torch.int8)
            self.scale_O = scale_O
        elif form == "onednn":
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OC.contiguous(), 16)
            self.two_rows = deterministic and weight_OC.dtype == torch.float32
        else:
            self.weight = weight_OC
            if deterministic and on_cpu:
                self.rows = 8

    def forward(self, x_NC: torch.Tensor) -> torch.Tensor:
        if self.rows == 1 or len(x_NC) % self.rows == 0:
            return self._product(x_NC)
        padded_NC = F.pad(x_NC, (0, 0, 0, -len(x_NC) % self.rows))
        return self._product(padded_NC)[: len(x_NC)]

    def _product(self, x_NC: torch.Tensor) -> torch.Tensor:
        if self.form == "onednn" and self.two_rows:
            return _onednn_two_rows(x_NC, self.weight, self.bias_O)
        if self.form == "onednn":
            return _onednn(x_NC, self.weight, self.bias_O)
        if self.form == "int8":
            assert self.scale_O is not None
            y_NO = torch._weight_int8pack_mm(x_NC, self.weight, self.scale_O)
            return y_NO if self.bias_O is None else y_NO + self.bias_O
        return F.linear(x_NC, self.weight, self.bias_O)


class PackedTogether:
    """Several matrices that read the same input, as one product: `Together`'s counterpart."""

    def __init__(self, product: PackedLinear, sizes: Sequence[int]) -> None:
        self.product = product
        self.sizes = list(sizes)

    def __call__(self, x_NC: torch.Tensor) -> Sequence[torch.Tensor]:
        y_NO = self.product(x_NC)
        return y_NO.split(self.sizes, dim=-1) if len(self.sizes) > 1 else (y_NO,)


class PackedGate(nn.Module):
    """`Gate`'s counterpart, where it is a product of its own: with one output more, which is cut off.

    PyTorch computes the sigmoid of whole vectors by another formula than that of what is left over, so that a column
    of numbers would get other bits the longer it is. One with gaps in memory is never read as vectors.
    """

    def __init__(self, product: PackedLinear, n_in: int, n_out: int) -> None:
        super().__init__()
        self.product = product
        self.n_in = n_in
        self.n_out = n_out

    def forward(self, x_NC: torch.Tensor) -> torch.Tensor:
        return self.product(x_NC[:, : self.n_in])[:, : self.n_out]


def onednn_works(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies in this dtype here, and gives what PyTorch's own product gives."""
    if dtype == torch.float16:
        return False  # it runs, but several times slower than PyTorch's own
    weight_OC = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    x_NC = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    try:
        y_NO = PackedLinear(weight_OC, None, "onednn")(x_NC)
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
def prepack(model: LanguageModel, *, int8: bool = False, deterministic: bool = True) -> Any:
    """Return `model` for inference, its weights as they are now; `model` itself stays as it is, and may train on.

    What is not a matrix (embeddings, norms, scalars) is shared with `model`, not copied. Where nothing is gained (large
    models on a GPU, models that are spread over devices or ranks) it is `model` itself that is returned.
    int8: matrices in 8 bits; raises ValueError where they cannot be. deterministic: see PackedLinear.
    """
    on_cpu = model.device.type == "cpu"
    if int8 and not (on_cpu and model.whole and model.dtype == torch.bfloat16 and model.config.n_embd % 16 == 0):
        raise ValueError("int8 weights need a CPU, NANOCHAT_DTYPE=bfloat16, and a width that 16 divides")
    if not model.whole or not (on_cpu or sum(weight.nbytes for weight in model.parameters()) < SMALL):
        return model
    form: Form = "onednn" if on_cpu and onednn_works(model.dtype) else "plain"

    def pack(matrices: Sequence[Linear], more: int = 0) -> PackedLinear:
        n_in = max(matrix.matrix_OC.size(1) for matrix in matrices)
        rows = [matrix.matrix_OC.detach().to(model.dtype) for matrix in matrices]
        weight_OC = torch.cat([F.pad(each_OC, (0, n_in - each_OC.size(1))) for each_OC in rows])  # gates read less
        weight_OC = F.pad(weight_OC, (0, 0, 0, more))
        biases = [matrix.bias.detach().to(model.dtype) for matrix in matrices if matrix.bias is not None]
        assert len(biases) in (0, len(matrices)), "matrices with and without bias cannot be one product"
        # a gate of its own has too few inputs for 8 bits, and too few weights to matter
        fits = int8 and n_in % 16 == 0
        return PackedLinear(weight_OC, torch.cat(biases) if biases else None, "int8" if fits else form, deterministic)

    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for weight in model.parameters():  # the same memory, but without a gradient: a trace takes them as constants
        shared[id(weight)] = nn.Parameter(weight.detach(), requires_grad=False)
    packed = copy.deepcopy(model, memo=shared).eval()  # modules are copied, tensors are not
    for module in list(packed.modules()):
        together = {name: value for name, value in vars(module).items() if isinstance(value, Together)}
        taken = []
        for name, value in together.items():
            matrices = [matrix for group in value.groups for matrix in group]
            sizes = [sum(len(matrix.matrix_OC) for matrix in group) for group in value.groups]
            setattr(module, name, PackedTogether(pack(matrices), sizes))
            taken += matrices
        for name, child in list(module.named_children()):
            if any(child is matrix for matrix in taken):
                delattr(module, name)
            elif isinstance(child, Gate):
                setattr(module, name, PackedGate(pack([child], more=1), child.in_features, child.out_features))
            elif isinstance(child, Linear):
                setattr(module, name, pack([child]))
    return packed
