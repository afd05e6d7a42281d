"""What torch.compile makes of a block on CUDA: one graph each way, and as little kept and moved as predicted."""

import copy
from unittest import mock

import pytest
import torch
from on_null_cuda import on_null_cuda

from dev.bench_plan import CAST_BYTES, LOGIT_BYTES, LOGIT_BYTES_FP8
from dev.fake_gpu import FakeGpu
from dev.gpu_workload import BLOCK_BYTES
from dev.graph_count import GraphCount
from dev.machine_code import MachineCode, read
from nanochat import gpt, recipe
from nanochat.fp8 import weights_quantised

T = 2048
DEPTH = 4  # SSSL: short windows with and without value embeddings, and a long one with
# Width / 64 and rows of the models that train so, see dev/gpu_workload.py.
SIZES = {"bf16": (12, 32), "bf16, fused MLP": (12, 32), "fp8": (24, 16)}

# Bytes for each token and channel that a compiled block keeps for its backward pass, 2 for a tensor in bf16. Of all
# kinds of blocks: the residual before attention and before the MLP; q and k, before and after their norms; the output
# of attention.
KEPT = 2 * 2 + 4 * 2 + 2
# The normed residuals that bf16 products have read (fp8 makes them again), and the hidden layer, four times as wide:
# before and after the squared ReLU, after it alone with the fused kernel, before it alone in fp8.
KEPT_BY_PRODUCTS = {"bf16": 2 * 2 + 2 * 8, "bf16, fused MLP": 2 * 2 + 8, "fp8": 8}
# v. In fp8 it is a part of the product of q, k and v, and keeps all of that, unless a value embedding is added to it.
KEPT_BY_VALUES = {"bf16": 2, "bf16, fused MLP": 2, "fp8": 6}
KEPT_BY_EMBEDDED_VALUES = 2 + 2  # v with the value embedding, and the embedding
# The weights of a block, 12·C² of them, as its products read them.
BYTES_OF_WEIGHTS = {"bf16": 2, "bf16, fused MLP": 2, "fp8": 1}


def bytes_kept(model, idx_BT):
    """Bytes of all tensors that the backward pass of the blocks would read, weights and inputs aside."""
    before = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in before:
            kept[storage._cdata] = (x, storage.nbytes())  # x: so that its address is not used again
        return x

    def stop(x_C, *rest, **settings):
        return x_C.sum()

    with (
        mock.patch.object(gpt, "softcap_cross_entropy", stop),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        model(idx_BT, idx_BT)
    return sum(n_bytes for _, n_bytes in kept.values())


@pytest.mark.parametrize("kind", SIZES)
@on_null_cuda
def test_a_block_is_one_graph_that_keeps_and_moves_what_is_predicted(kind):
    graphs = GraphCount()
    with FakeGpu() as gpu, graphs.instead_of_running():
        depth_of_width, rows = SIZES[kind]
        config = recipe.model_config(DEPTH, 32768, T, aspect_ratio=64 * depth_of_width // DEPTH)
        C = config.n_embd
        with gpu.watch:
            model = gpt.build_model(config, gpu.device, train=True, compiled=True, fp8=kind == "fp8")
        for block in model.blocks:
            block.mlp.fused = kind == "bf16, fused MLP"
        idx_BT = torch.zeros(rows, T, dtype=torch.int64, device=gpu.device)

        def new_graphs(recompute=False):
            before = len(graphs.compiled)
            graphs.forget_runs()
            with weights_quantised(model):
                (model(idx_BT, idx_BT, loss_reduction="sum", recompute=recompute) / 3).backward()
            return len(graphs.compiled) - before

        # Three kinds of blocks, forward and backward, and a chunk of the loss, to say the least.
        assert new_graphs() >= 2 * 3 + 1
        moved = graphs.kernel_bytes("forward", "backward") / (idx_BT.numel() * C * DEPTH)
        assert 0.9 * BLOCK_BYTES[kind] < moved <= BLOCK_BYTES[kind]
        # What has no graph of a backward pass: the loss and, in fp8, the casts of the weights.
        logits = idx_BT.numel() * config.padded_vocab_size
        weights = sum(matrix.numel() for matrix in model.blocks.parameters())
        most = LOGIT_BYTES_FP8 * logits + CAST_BYTES * weights if kind == "fp8" else LOGIT_BYTES * logits
        assert 0.6 * most < graphs.kernel_bytes("inference") <= most
        # Later steps need nothing new.
        for recompute in (False, True, True, False):
            assert new_graphs(recompute) == 0
            # A block is one graph: where it was broken, there would be more of them than blocks.
            assert graphs.runs("forward") == (2 if recompute else 1) * DEPTH
            assert graphs.runs("backward") == DEPTH
        assert sum("nanochat.flash3.default" in graph.operators for graph in graphs.compiled) == 3

        if kind == "bf16":
            # Evaluation compiles the three kinds without gradients, once.
            with torch.no_grad():
                model(idx_BT, idx_BT, loss_reduction="none")
                compiled = len(graphs.compiled)
                model(idx_BT, idx_BT, loss_reduction="none")
            assert len(graphs.compiled) == compiled
            assert new_graphs() == 0

        # What the blocks keep beside the rest of the model, which keeps the first block's residual, the embedding, too.
        without_blocks = copy.copy(model)
        without_blocks._modules = {**model._modules, "blocks": torch.nn.ModuleList()}
        with weights_quantised(model):
            kept = bytes_kept(model, idx_BT) - bytes_kept(without_blocks, idx_BT)
        values = (KEPT_BY_VALUES[kind] + KEPT_BY_EMBEDDED_VALUES) / 2
        weights = 12 * C * BYTES_OF_WEIGHTS[kind] / idx_BT.numel()
        predicted = KEPT + KEPT_BY_PRODUCTS[kind] + values + weights - 2 / DEPTH
        assert kept / (idx_BT.numel() * C * DEPTH) == pytest.approx(predicted, rel=0.02)


def test_bytes_are_counted_as_on_paper():
    """On the CPU, which Inductor compiles for in the same way."""
    x = torch.randn(64, 128)
    w = torch.randn(128, 256).to(torch.bfloat16)

    def f(x, w):
        return torch.relu(x.to(torch.bfloat16) @ w).square().sum(dim=-1)

    graphs = GraphCount()
    with graphs.instead_of_running():
        y = torch.compile(f)(x, w)
    torch.testing.assert_close(y, f(x, w))
    (graph,) = graphs.compiled
    assert (graph.kind, graph.runs) == ("inference", 1)
    cast = 64 * 128 * (4 + 2)
    summed = 64 * 256 * 2 + 64 * 2
    assert graph.kernel_bytes == cast + summed


def test_machine_code_is_read():
    """As the disassembler prints it; the widths are in the names of the instructions."""
    code = read("""
 Function triton_:
  REG:255 STACK:80 SHARED:1024 LOCAL:8 CONSTANT[0]:572 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0110*/                   LDG.E.EL.128 R4, desc[UR4][R2.64] ;
        /*0120*/                   LDG.E.U16 R5, desc[UR4][R8.64+0x80] ;
        /*0130*/                   STG.E desc[UR4][R2.64], R4 ;
""")
    assert code == MachineCode(registers=255, spilled_bytes=88, load_bits=128, store_bits=32)
    narrow = read("REG:8 STACK:0 SHARED:0 LOCAL:0\n LDG.E.U8 R4, [R2]; STG.E.EF.64 [R2], R4;")
    assert (narrow.spilled_bytes, narrow.load_bits, narrow.store_bits) == (0, 8, 64)
    tiles = read("REG:168 STACK:0 SHARED:0 LOCAL:0\n UTMALDG.2D [UR8], [UR4]; STG.E.64 [R2], R4;")
    assert (tiles.load_bits, tiles.store_bits) == (128, 64)
