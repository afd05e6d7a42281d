"""The CUDA path on paper: which devices and dtypes a GPU would see, what the CPU does meanwhile, and what waits.

The real training loop and engine run on tensors without values (null_cuda.py, fake_gpu.py). So this says nothing of
speed, of rounding or of kernels; those are for `python -m dev.gpu_check`, on a GPU.
"""

from unittest import mock

import paper_run
import pytest
import torch
from on_null_cuda import on_null_cuda

from dev.fake_gpu import FakeGpu
from nanochat import gpt, recipe
from nanochat.compute import Compute
from nanochat.cuda_graph import CudaGraphs, Graph
from nanochat.engine import Engine, Request
from nanochat.recipe import TrainConfig

T = 2048
BF16 = torch.bfloat16
STAGING = ("aten.numpy_T.default", "aten.contiguous.default")  # of what the engine sends to the GPU for a step


@pytest.mark.parametrize(
    "gpu_name, depth, rows, steps, recompute, fp8",
    [
        ("H100", 24, 16, 1, False, True),
        ("H100", 12, 32, 2, False, False),
        ("RTX 4090", 12, 8, 1, True, False),
    ],
)
@on_null_cuda
def test_training_stays_on_the_gpu(gpu_name, depth, rows, steps, recompute, fp8, tmp_path, monkeypatch):
    """At real size, with accumulation, evaluation, checkpoint and optimizer; not compiled (test_cuda_graphs.py is)."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    config = TrainConfig(
        num_iterations=steps,
        eval_tokens=rows * T,
        device_batch_size=rows,
        activation_checkpointing=recompute,
    )
    with FakeGpu(gpu_name) as gpu, gpu.watch:
        model = gpt.build_model(recipe.model_config(depth, paper_run.VOCABULARY, T), gpu.device, train=True, fp8=fp8)
        expected = "flash-attention-3" if gpu_name == "H100" else "flex and cudnn"
        assert f"attention {expected}" in model.kernels.names
        run = paper_run.make_run(model, Compute(gpu.device, BF16), config, total_batch_size=2 * rows * T)

        # The weights, and what the optimizer keeps of them. Embeddings are looked up, not multiplied: bf16 will do.
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (BF16 if "embed" in name and "skip" not in name else torch.float32), name
        state = run.optimizer.state_dict()
        assert {(x.device, x.dtype) for x in state.values()} == {(gpu.device, torch.float32)}
        before = {name: (id(p), p.dtype, p.shape) for name, p in model.named_parameters()}

        gpu.watch.forget()
        paper_run.train(run)

        assert run.step == steps
        assert before == {name: (id(p), p.dtype, p.shape) for name, p in model.named_parameters()}
        assert all(p.device == gpu.device and p.grad is None for p in model.parameters())
        # The table of bytes per token, from a list.
        assert gpu.watch.on_cpu == ["aten.lift_fresh.default"]
        # The loss of each step, and the four sums of the evaluation: nothing else may make Python wait for the GPU.
        assert len(gpu.watch.reads) == steps + 4, gpu.watch.reads
        # Products in fp32 would take a GPU many times as long.
        short = {BF16, torch.float8_e4m3fn, torch.float8_e5m2} if fp8 else {BF16}
        assert gpu.watch.products == short


@on_null_cuda
def test_logits_and_gradients_have_their_dtypes():
    with FakeGpu() as gpu, gpu.watch:
        model = gpt.build_model(recipe.model_config(4, paper_run.VOCABULARY, T), gpu.device, train=True)
        idx_BT = torch.zeros(2, T, dtype=torch.int64, device=gpu.device)
        for reduction, shape in (("mean", ()), ("sum", ()), ("none", (2, T))):
            loss = model(idx_BT, idx_BT, loss_reduction=reduction)
            assert (loss.device, loss.dtype, tuple(loss.shape)) == (gpu.device, torch.float32, shape)
            loss.sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad.device, parameter.grad.dtype) == (gpu.device, parameter.dtype), name
        logits_BTV = model(idx_BT)
        assert (logits_BTV.device, logits_BTV.dtype) == (gpu.device, torch.float32)
        assert tuple(logits_BTV.shape) == (2, T, paper_run.VOCABULARY)


class FakeGraph:
    """Stands in for torch.cuda.CUDAGraph: nothing is recorded, so a replay leaves the outputs as they are."""

    def replay(self) -> None:
        pass


@on_null_cuda
def test_decoding_captures_a_graph_for_each_power_of_two_of_rows_and_slots():
    captured = []

    def capture(graphs, inputs_4N, length):
        captured.append((inputs_4N.size(1), length))
        assert (inputs_4N.device.type, inputs_4N.dtype) == ("cuda", torch.int64)
        logits_NV = graphs._step(inputs_4N, length)
        assert (logits_NV.device.type, logits_NV.dtype) == ("cuda", torch.float32)
        assert tuple(logits_NV.shape) == (inputs_4N.size(1), paper_run.VOCABULARY)
        return Graph(FakeGraph(), inputs_4N.clone(), logits_NV)

    def generate(n_requests):
        requests = [Request([1] * 100, max_tokens=60) for _ in range(n_requests)]
        engine.run(requests)
        assert all(len(request.output) == 60 for request in requests)

    with FakeGpu() as gpu, gpu.watch, mock.patch.object(CudaGraphs, "_capture", capture):
        model = gpt.build_model(recipe.model_config(4, paper_run.VOCABULARY, T), gpu.device, train=False)
        assert {parameter.dtype for parameter in model.parameters() if parameter.dim() > 1} == {BF16}
        engine = Engine(model, paper_run.TOKENIZER, max_batch=8)
        for n_requests in (1, 3):
            generate(n_requests)
        # From 100 tokens to 160: up to 128 slots, then up to 256.
        assert {(1, 128), (1, 256), (4, 128), (4, 256)} <= set(captured)
        assert set(captured) <= {(rows, slots) for rows in (1, 2, 4) for slots in (128, 256)}

        # The memory of the cache has stopped growing, so that the same requests find their graphs.
        generate(3)
        captured.clear()
        gpu.watch.forget()
        generate(3)
        assert not captured
        # The CPU lays out the tokens of a step, and reads which were sampled: 60 steps of 3 numbers.
        assert set(gpu.watch.on_cpu) <= {"aten.lift_fresh.default", "aten.detach_.default", *STAGING}
        assert len(gpu.watch.reads) == 60 * 3
        assert gpu.watch.products == {BF16}
