"""Ranks of eight on paper: what each would send, in pretraining, fine-tuning and RL.

Collectives have no addresses. nccl pairs the first of one rank with the first of the others, and so on, and where two
do not fit together it waits forever or mixes up memory. So their order, shapes and dtypes must be equal on all ranks,
whatever rows a rank has, or answers, or nothing at all.
"""

import contextlib
import sys
from typing import Any
from unittest import mock

import paper_run
import pytest
from on_null_cuda import on_null_cuda

from dev.fake_gpu import FakeGpu
from nanochat import chat_eval, checkpoint, finetune, gpt, recipe, rl, trainer
from nanochat.engine import Engine
from scripts import base_train

WORLD_SIZE = 8
# Each takes seconds: those with a row to evaluate, the first without one, and the last. The others are like these.
RANKS = (0, 1, 2, 3, 7)
T = 256
# Rows of the validation set: one for each of the first three ranks, and none for the others.
EVAL_FLAGS = {"eval_tokens": 3 * T}
RUN_FLAGS = {"num_iterations": 1, "device_batch_size": 2, "sample_every": 0, "compile": False}


def make_source(device):
    """A trained model, as far as a stage that goes on from it is concerned."""
    model = gpt.build_model(recipe.model_config(4, paper_run.VOCABULARY, T), device, train=True)
    meta = {"total_batch_size": 2 * WORLD_SIZE * T, "dataset": "paper", "depth": 4, "tag": "paper"}
    return finetune.Source(model, paper_run.TOKENIZER, meta, "paper")


def pretrain():
    flags = {"depth": 4, "max_seq_len": T, "total_batch_size": 2 * WORLD_SIZE * T, **RUN_FLAGS, **EVAL_FLAGS}
    del flags["compile"]
    words = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]
    with (
        mock.patch.object(sys, "argv", ["base_train", "--no-compile", *words]),
        mock.patch.object(base_train, "PROMPTS", ["one"]),
        mock.patch.object(base_train, "load_tokenizer", lambda: paper_run.TOKENIZER),
        mock.patch.object(base_train, "TextRows", lambda dataset, split, tokenizer, T: paper_run.PaperRows(T, 1000)),
    ):
        base_train.main()


def fine_tune():
    config = finetune.FinetuneConfig(**RUN_FLAGS, **EVAL_FLAGS, grad_clip=1.0)
    finetune.finetune(config, "sft", "mid", [], [])


class Task:
    """Problems to which answers of an even length are right."""

    name = "paper"
    eval_type = "generative"
    baseline = 0.0
    skipped = 0

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": str(index)}]}

    def evaluate(self, conversation: Any, completion: str) -> bool:
        return len(completion) % 2 == 0


def reinforce():
    config = rl.RLConfig(**RUN_FLAGS, **EVAL_FLAGS, problems=WORLD_SIZE, samples=4, eval_problems=10)
    rl.reinforce(config, [Task()], [Task()], [])


def answer(engine: Engine, requests: Any) -> None:
    """Stands in for Engine.run. Answers to some problems are all equal: nothing is to be learned from them."""
    for request in requests:
        n = 2 if request.seed % 2 else 1 + (request.seed + request.sample) % 7
        request.output = [5] * n
        request.mask = [1] * n
        request.finish_reason = "stop"
        request.stop_token = 3


@contextlib.contextmanager
def on_paper(device):
    """Stand-ins for what would read checkpoints and data sets, or sample."""
    source = make_source(device)
    rows = paper_run.PaperRows(T, 1000)
    with contextlib.ExitStack() as patches:
        for module in (finetune, rl):
            patches.enter_context(mock.patch.object(module, "load_source", lambda *_: source))
            patches.enter_context(mock.patch.object(module, "conversation_rows", lambda *_, **__: rows))
        patches.enter_context(mock.patch.object(trainer, "RowLoader", paper_run.PaperLoader))
        patches.enter_context(mock.patch.object(checkpoint, "_write_tensors", paper_run.written))
        patches.enter_context(mock.patch.object(Engine, "run", answer))
        for module in (rl, chat_eval):
            patches.enter_context(mock.patch.object(module, "render_for_completion", lambda *_: [1, 2, 3]))
        yield


STAGES = {"pretrain": pretrain, "fine_tune": fine_tune, "reinforce": reinforce}


@pytest.mark.parametrize("stage", STAGES)
@on_null_cuda
def test_all_ranks_send_the_same(stage, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    sent = {}
    for rank in RANKS:
        with FakeGpu() as gpu, gpu.watch, paper_run.one_of_ranks(rank, WORLD_SIZE), on_paper(gpu.device):
            STAGES[stage]()
            sent[rank] = gpu.watch.sent
    for rank in RANKS:
        assert sent[rank] == sent[0], rank
    names = {name for name, *_ in sent[0]}
    assert {"c10d._reduce_scatter_base_.default", "c10d._allgather_base_.default"} <= names
