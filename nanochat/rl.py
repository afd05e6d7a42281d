"""Reinforcement learning on tasks that tell a right answer from a wrong one, by group-relative policy gradient.

To each problem the model samples a group of answers. An answer's advantage A is its reward, 1 or 0, less the mean of
its group, and the loss of a step is the sum of -A · log p over all tokens that the model itself sampled, divided by
their number in the whole step, over all groups, micro-batches and ranks.

That is GRPO (arXiv 2402.03300) without its division by the group's standard deviation and by each answer's length,
which bias it (Dr. GRPO, arXiv 2503.20783), and with DAPO's mean over the tokens of a batch (arXiv 2503.14476). A batch
is used for one update, by the very model that sampled it, so there is no ratio to clip; nor is there a reference model.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanochat import checkpoint, recipe
from nanochat.chat_eval import evaluate_task, pass_rates
from nanochat.cli import option, require_positive
from nanochat.common import print0
from nanochat.compute import Compute
from nanochat.conversation import render_for_completion
from nanochat.dataloader import RowLoader
from nanochat.engine import Engine, Request
from nanochat.finetune import Conversations, SourceConfig, conversation_rows, load_source
from nanochat.gpt import GPT
from nanochat.run import (
    Progress,
    Run,
    describe,
    diverged,
    finish_step,
    open_log,
    record_evaluation,
    save,
    start_or_resume,
    stop_signals,
    write_run_record,
)
from nanochat.tokenizer import Tokenizer
from nanochat.trainer import (
    choose_device_batch,
    explain_out_of_memory,
    is_due,
    learning_rate_multiplier,
    make_optimizer,
    prepare_model,
    update_weights,
    validation_bpb,
)

MicroBatch = tuple[torch.Tensor, ...]  # inputs_BT, targets_BT, weights_BT
PASS_AT = (1, 4, 8)  # the last is the number of answers sampled to each test problem
Tasks = Sequence[Any]  # of tasks.common.Task


@dataclass(frozen=True)
class RLConfig(SourceConfig):
    """Flags of reinforcement learning."""

    problems: int = option(16, "problems a step, over all processes")
    samples: int = option(8, "answers sampled to each problem")
    max_new_tokens: int = option(128, "longest answer, in tokens; one that is cut off counts as wrong")
    rollout_batch_size: int = option(128, "answers that a device samples at once")
    eval_problems: int = option(200, "test problems of each task in an evaluation")
    num_iterations: int = option(100, "steps")
    init_lr_frac: float = option(0.05, "factor on all learning rates")
    grad_clip: float | None = option(1.0, "largest gradient norm; unset = no clipping")
    eval_every: int = option(25, "steps between evaluations (0 = only before and after)")
    compile: bool = option(False, "fuse with torch.compile; answers differ in length, and each length is compiled anew")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "problems", "max_new_tokens", "rollout_batch_size", "eval_problems")
        if self.samples < 2:
            raise ValueError(f"--samples {self.samples}: an answer is compared with others, give 2 or more")
        if self.total_batch_size is not None:
            raise ValueError("--total-batch-size: the batch is --problems times --samples answers, leave it out")
        if self.fp8:
            raise ValueError("--fp8 is for training alone, not for sampling: leave it out")


@dataclass(frozen=True)
class Batch:
    """A step's work for this rank, and what its line of metrics says besides. With none, the step changes nothing."""

    micro_batches: list[MicroBatch]
    tokens: int  # over all ranks
    line: dict[str, Any]


@dataclass(frozen=True)
class Group:
    """The answers sampled to one problem, and their rewards; empty where the problem cannot be asked."""

    requests: list[Request]
    rewards: list[float]

    @property
    def advantages(self) -> list[float]:
        """Each reward less the group's mean: all zero where the rewards are equal."""
        return [reward - sum(self.rewards) / len(self.rewards) for reward in self.rewards]


def judge(task: Any, conversation: dict[str, Any], request: Request, tokenizer: Tokenizer) -> float:
    """1 for an answer that is right, that ends by itself, and whose tool results are the tool's own; else 0."""
    ended = request.stop_token == tokenizer.encode_special("<|assistant_end|>")
    results = {tokenizer.encode_special(mark) for mark in ("<|output_start|>", "<|output_end|>")}
    forged = any(token in results and sampled for token, sampled in zip(request.output, request.mask, strict=True))
    return float(ended and not forged and task.evaluate(conversation, tokenizer.decode(request.output)))


def sampled_row(request: Request) -> tuple[list[int], list[int]]:
    """Ids of a prompt and its answer, and their mask: 1 = sampled by the model, as is the token that ended it."""
    end = [] if request.stop_token is None else [request.stop_token]
    return [*request.tokens, *request.output, *end], [0] * len(request.tokens) + request.mask + [1] * len(end)


def make_micro_batches(groups: Sequence[Group], n_tokens: int, rows: int, device: torch.device) -> list[MicroBatch]:
    """(inputs_BT, targets_BT, weights_BT) of all answers that have an advantage, the longest first, `rows` at a time.

    A weight is the answer's advantage over `n_tokens`; the target of a token that was not sampled is -1.
    """
    answers = [(*sampled_row(r), a) for g in groups for r, a in zip(g.requests, g.advantages, strict=True) if a]
    answers.sort(key=lambda answer: -len(answer[0]))
    micro_batches = []
    for start in range(0, len(answers), rows):
        part = answers[start : start + rows]
        shape = (len(part), len(part[0][0]) - 1)
        idx_BT, targets_BT, weights_BT = torch.zeros(shape).long(), torch.full(shape, -1), torch.zeros(shape)
        for i, (ids, mask, advantage) in enumerate(part):
            n = len(ids) - 1
            idx_BT[i, :n] = torch.tensor(ids[:-1])
            targets_BT[i, :n] = torch.tensor([token if own else -1 for token, own in zip(ids[1:], mask[1:])])
            weights_BT[i, :n] = advantage / n_tokens
        micro_batches.append(tuple(tensor.to(device) for tensor in (idx_BT, targets_BT, weights_BT)))
    return micro_batches


class Rollouts:
    """Samples answers and makes them into batches. What a step asks and draws follows from (seed, step) alone."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, train: Tasks, test: Tasks, config: RLConfig, compute: Compute
    ) -> None:
        self.model, self.tokenizer, self.config, self.compute, self.test = model, tokenizer, config, compute, test
        self.places = [(task, index) for task in train for index in range(len(task))]
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> list[tuple[Any, int]]:
        return random.Random(f"rl {self.config.seed} {epoch}").sample(self.places, len(self.places))

    def problems(self, step: int) -> dict[str, tuple[Any, int]]:
        """A step's problems over all ranks, (task, index) by a name: all once an epoch, each epoch in another order."""
        n = self.config.problems
        where = [divmod(i, len(self.places)) for i in range(step * n, (step + 1) * n)]
        return {f"{step} {slot}": self._order(epoch)[at] for slot, (epoch, at) in enumerate(where)}

    def sample(self, problems: dict[str, tuple[Any, int]], n: int) -> list[Group]:
        """`n` answers to each problem that this rank has by the names; none to one that is malformed or too long.

        An answer follows from the model, the problem, its name and the answer's number.
        """
        self.model.eval()  # and so it stays: what is trained must be what has sampled, without dropout
        mine = list(problems.items())[self.compute.rank :: self.compute.world_size]
        asked = [(task, task[index], name) for name, (task, index) in mine]
        requests = [self._requests(conversation, name, n) for _, conversation, name in asked]
        engine = Engine(self.model, self.tokenizer, self.config.rollout_batch_size)  # new: no state outlives a step
        with torch.compiler.set_stance("force_eager"):
            engine.run(itertools.chain.from_iterable(requests))
        return [
            Group(answers, [judge(task, conversation, answer, self.tokenizer) for answer in answers])
            for (task, conversation, _), answers in zip(asked, requests)
        ]

    def _requests(self, conversation: dict[str, Any], name: str, n: int) -> list[Request]:
        longest, seed = self.config.max_new_tokens, random.Random(f"rl {self.config.seed} {name}").getrandbits(62)
        try:
            prompt = render_for_completion(conversation, self.tokenizer)
        except ValueError:
            return []
        fits = len(prompt) <= self.model.config.sequence_len - longest
        return [Request(prompt, longest, seed=seed, sample=i) for i in range(n if fits else 0)]

    def _batch(self, step: int, rows: int) -> Batch:
        config, device, began = self.config, self.compute.device, time.perf_counter()
        groups = self.sample(self.problems(step), config.samples)
        answers = [request for group in groups for request in group.requests]
        counts = (
            sum(not group.requests for group in groups),
            len(answers),
            sum(sum(group.rewards) for group in groups),
            sum(any(group.advantages) for group in groups),
            sum(sum(sampled_row(answer)[1]) for answer in answers),
            sum(answer.finish_reason == "length" for answer in answers),
        )
        totals = self.compute.all_reduce_sum(torch.tensor(counts, dtype=torch.float32, device=device))
        unusable, n, right, useful, n_tokens, cut_off = totals.tolist()
        if not n:
            T, longest = self.model.config.sequence_len, config.max_new_tokens
            raise ValueError(f"--max-new-tokens {longest} leaves room for no problem of step {step} in {T} tokens")
        micro_batches = make_micro_batches(groups, n_tokens, rows, device)
        if useful and not micro_batches:  # other ranks have some, and wait for this one's gradients
            zeros_BT = torch.zeros(1, 1, dtype=torch.int64, device=device)
            micro_batches = [(zeros_BT, zeros_BT - 1, zeros_BT.float())]
        line = {"epoch": step * config.problems // len(self.places), "reward": right / n, "answer_tokens": n_tokens / n}
        line |= {"cut_off": cut_off / n, "unusable": int(unusable), "sampling_dt": time.perf_counter() - began}
        line["useful"] = useful / config.problems  # share of groups whose rewards differ
        # the model's training FLOPs say nothing of sampling
        return Batch(micro_batches, int(n_tokens), {**line, "mfu": None})

    def evaluate(self, step: int) -> dict[str, Any]:
        """`tasks`: of each test task the accuracy of the likeliest answers and pass@k of sampled ones, with errors."""
        compute, longest, tasks = self.compute, self.config.max_new_tokens, {}
        for task in self.test:
            n = min(self.config.eval_problems, len(task))
            engine = Engine(self.model, self.tokenizer, self.config.rollout_batch_size)
            record = evaluate_task(task, self.model, self.tokenizer, engine, n, max_new_tokens=longest, compute=compute)
            record.pop("samples")
            groups = self.sample({f"test {task.name} {i}": (task, i) for i in range(n)}, PASS_AT[-1])
            right_N, own = torch.zeros(n, device=compute.device), [sum(group.rewards) for group in groups]
            right_N[compute.rank :: compute.world_size] = torch.tensor(own, device=compute.device)
            rights = [int(right) for right in compute.all_reduce_sum(right_N).tolist()]
            record["pass_at_k"] = pass_rates(rights, PASS_AT[-1], PASS_AT)
            shown = {"accuracy": record, **{f"pass@{k}": score for k, score in record["pass_at_k"].items()}}
            scores = (f"{name} {100 * s['accuracy']:.1f} ± {100 * s['stderr']:.1f} %" for name, s in shown.items())
            print0(f"step {step}: {task.name}, {n} problems: {', '.join(scores)}")
            tasks[task.name] = record
        return {"tasks": tasks}


def reinforce(config: RLConfig, train: Tasks, test: Tasks, held_out: Conversations, compute: Compute) -> None:
    """Train the newest SFT model on the tasks `train` and save it as stage rl.

    `test` are other problems of the same tasks, for evaluation alone. The bits per byte of `held_out` say whether the
    model forgets what it is not rewarded for. Raises ValueError when there is no SFT model.
    """
    if config.problems % compute.world_size:
        raise ValueError(f"--problems {config.problems}: make it a multiple of the {compute.world_size} processes")
    model, tokenizer, meta = load_source("sft", config, compute)
    T = model.config.sequence_len
    rollouts = Rollouts(model, tokenizer, train, test, config, compute)
    rules = {name: getattr(config, name) for name in ("problems", "samples", "max_new_tokens")}
    rules["tasks"] = ", ".join(task.name for task in train)
    print0(
        f"rl from {meta['source']}: {config.num_iterations} steps of {config.problems} x {config.samples} answers; "
        f"{len(rollouts.places):,} problems of {rules['tasks']}"
    )
    total_batch_size = config.problems * config.samples * T  # at most
    prepare_model(model, config, compute)
    facts = {"dataset": meta["dataset"], "depth": meta["depth"], "source": meta["source"], "rollouts": rules}
    run = Run(
        stage="rl",
        tag=config.model_tag or meta["tag"],
        config=config,
        model=model,
        optimizer=make_optimizer(
            model,
            config,
            recipe.learning_rate_scales(total_batch_size, config.init_lr_frac),
            config.weight_decay or 0.0,
            compute,
        ),
        tokenizer=tokenizer,
        compute=compute,
        num_iterations=config.num_iterations,
        meta=describe(config, model, tokenizer, total_batch_size, config.num_iterations, facts),
    )
    batch = choose_device_batch(run, config.problems * config.samples // compute.world_size)
    val_loader = RowLoader(
        conversation_rows("rl_val", held_out, tokenizer, T, compute),
        batch.rows * compute.world_size,
        batch.rows,
        0,
        rank=compute.rank,
        world_size=compute.world_size,
        device=compute.device,
    )
    progress = start_or_resume(run)
    first_step = progress.step
    with stop_signals() as stop, contextlib.closing(open_log(run, first_step)) as log:
        while True:
            step = progress.step
            last = step == config.num_iterations
            if last or is_due(step, config.save_every or config.eval_every):
                save(run, progress)
            evaluated_before = step == first_step and progress.val_bpb is not None
            if (last or step == 0 or is_due(step, config.eval_every)) and not evaluated_before:
                bpb = validation_bpb(run, step, val_loader)
                record_evaluation(run, progress, log, {"val_bpb": bpb, **rollouts.evaluate(step)})
            if step == progress.saved_step and compute.rank == 0:
                checkpoint.prune("rl", run.tag, config.keep)
            if last:
                break
            if compute.any_rank(stop.requested):
                save(run, progress)
                raise KeyboardInterrupt
            log.write(_train_step(run, progress, rollouts, batch.rows))
    write_run_record(run, progress, plan=dataclasses.asdict(batch))
    compute.close()


def _train_step(run: Run, progress: Progress, rollouts: Rollouts, rows: int) -> dict[str, Any]:
    """Sample a step's answers and learn from them; where no group's rewards differ the step changes nothing."""
    began = time.perf_counter()
    step, compute = progress.step, run.compute
    lr_mult = learning_rate_multiplier(run, step)
    batch = rollouts._batch(step, rows)
    scores = {}
    mean_loss = 0.0
    if batch.micro_batches:
        counts = torch.stack([(targets_BT >= 0).sum() for _, targets_BT, _ in batch.micro_batches])
        n_targets = compute.all_reduce_sum(counts.sum().float()).clamp(min=1)
        totals_2 = torch.zeros(2, device=compute.device)
        with explain_out_of_memory(rows):
            for idx_BT, targets_BT, weights_BT in batch.micro_batches:
                nll_BT = run.model(idx_BT, targets_BT, loss_reduction="none")
                loss = (nll_BT * weights_BT).sum()
                loss.backward()
                totals_2 += torch.stack([loss.detach(), nll_BT.detach().sum() / n_targets])
            mean_loss, scores["nll"] = compute.all_reduce_sum(totals_2).tolist()
            if not math.isfinite(mean_loss):
                raise diverged(run, step, f"loss is {mean_loss} at step {step}")
            grad_norm = update_weights(run, step, lr_mult)
        if grad_norm is not None:
            scores["grad_norm"] = grad_norm
    compute.synchronize()
    line = finish_step(
        run, progress, loss=mean_loss, lr_mult=lr_mult, tokens=batch.tokens, dt=time.perf_counter() - began
    )
    return {**line, **batch.line, **scores}
