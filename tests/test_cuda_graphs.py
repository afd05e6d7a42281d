"""What torch.compile makes of a block on CUDA: one graph each way, none new later, and as little kept as predicted."""

import copy
from unittest import mock

import pytest
import torch
from fake_gpu import FakeGpu
from graph_count import GraphCount
from null_cuda import on_null_cuda

from nanochat import gpt, recipe

T = 2048
ROWS = 4
DEPTH = 4  # SSSL: short windows with and without value embeddings, and a long one with

# Numbers for each token and channel that a compiled block keeps for its backward pass. Of attention: its residual, and
# that normed for the products; q and k, before and after their norms; v; the output; and a value embedding on every
# other layer. Of the MLP: its residual, and that normed; and its hidden layer, four times as wide, before and after the
# squared ReLU. The fused kernel keeps the latter alone.
ATTENTION = 1 + 1 + 4 + 1 + 1 + 0.5
NUMBERS_KEPT = {"bf16": ATTENTION + 2 + 2 * 4, "bf16 fused": ATTENTION + 2 + 4}
# In fp8 the partitioner chooses which of them are kept in 8 bits, so this is a limit: 37 GB for a d24 of 16 rows.
MOST_BYTES_KEPT_IN_FP8 = 30.6


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


@pytest.mark.parametrize("kind", ["bf16", "bf16 fused", "fp8"])
@on_null_cuda
def test_a_block_is_one_graph_and_keeps_what_is_predicted(kind):
    graphs = GraphCount()
    with FakeGpu() as gpu, graphs.instead_of_inductor():
        config = recipe.model_config(DEPTH, 32768, T, aspect_ratio=192)
        C = config.n_embd
        with gpu.watch:
            model = gpt.build_model(config, gpu.device, train=True, compiled=True, fp8=kind == "fp8")
        for block in model.blocks:
            block.mlp.fused = kind == "bf16 fused"
        idx_BT = torch.zeros(ROWS, T, dtype=torch.int64, device=gpu.device)

        def new_graphs(recompute=False):
            before = graphs.compiled
            graphs.forget_runs()
            (model(idx_BT, idx_BT, loss_reduction="sum", recompute=recompute) / 3).backward()
            return graphs.compiled - before

        # Three kinds of blocks, forward and backward, and a chunk of the loss, to say the least.
        assert new_graphs() >= 2 * 3 + 1
        # Later steps need nothing new.
        for recompute in (False, True, True, False):
            assert new_graphs(recompute) == 0
            # A block is one graph: where it was broken, there would be more of them than blocks.
            assert graphs.runs["forward"] == (2 if recompute else 1) * DEPTH
            assert graphs.runs["backward"] == DEPTH
        assert sum("nanochat.flash3.default" in nodes for nodes in graphs.nodes) == 3

        # Evaluation compiles the three kinds without gradients, once.
        with torch.no_grad():
            model(idx_BT, idx_BT, loss_reduction="none")
            compiled = graphs.compiled
            model(idx_BT, idx_BT, loss_reduction="none")
        assert graphs.compiled == compiled
        assert new_graphs() == 0

        # Beside what the blocks keep for every token: the embedding, which all share, and weights cast to bf16.
        without_blocks = copy.copy(model)
        without_blocks._modules = {**model._modules, "blocks": torch.nn.ModuleList()}
        kept = bytes_kept(model, idx_BT) - bytes_kept(without_blocks, idx_BT)
        numbers = kept / (idx_BT.numel() * C * DEPTH)
        if kind == "fp8":
            assert numbers <= MOST_BYTES_KEPT_IN_FP8
        else:
            predicted = NUMBERS_KEPT[kind] + 1 / DEPTH + 12 * C / idx_BT.numel()
            assert numbers / 2 == pytest.approx(predicted, rel=0.05)
