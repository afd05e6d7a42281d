"""Reinforcement learning on tasks that tell a right answer from a wrong one, by group-relative policy gradient.

To each problem the model samples a group of answers. An answer's advantage A is its reward, 1 or 0, less the mean of
its group, and the loss of a step is the sum of -A · log p over all tokens that the model itself sampled, divided by
their number in the whole step, over all groups, micro-batches and ranks.

That is GRPO (arXiv 2402.03300) without its division by the group's standard deviation and by each answer's length,
which bias it (Dr. GRPO, arXiv 2503.20783), and with DAPO's mean over the tokens of a batch (arXiv 2503.14476). A batch
is used for one update, by the very model that sampled it, so there is no ratio to clip; nor is there a reference model.

Read `reinforce` from top to bottom: save, evaluate, sample and learn, step after step. `Rollouts` decides what is asked
and samples the answers, `train_step` learns from them. What a checkpoint brings back is in run.py: a step's problems
and answers follow from (seed, step), so an interrupted run goes on to the bit.
"""

import contextlib
import dataclasses
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from nanochat import checkpoint, recipe, trainer
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

PASS_AT = (1, 4, 8)  # the last is the number of answers sampled to each test problem

MicroBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # inputs_BT, targets_BT, weights_BT
Problem = tuple[Any, int]  # a tasks.common.Task and the place of one of its conversations
Tasks = Sequence[Any]  # of tasks.common.Task


@dataclass(frozen=True)
class RLConfig(SourceConfig):
    """Flags of reinforcement learning."""

    problems: int = option(16, "problems per step, over all processes")
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


def reinforce(config: RLConfig, train: Tasks, test: Tasks, held_out: Conversations, compute: Compute) -> None:
    """Train the newest SFT model on the tasks `train` and save it as stage rl.

    test: other problems of the same tasks, for evaluation alone. held_out: conversations whose bits per byte say
    whether the model forgets what it is not rewarded for. Raises ValueError when there is no SFT model.
    """
    if config.problems % compute.world_size:
        raise ValueError(f"--problems {config.problems}: make it a multiple of the {compute.world_size} processes")
    model, tokenizer, meta = load_source("sft", config, compute)
    T = model.config.sequence_len
    rollouts = Rollouts(model, tokenizer, train, test, config, compute)
    task_names = ", ".join(task.name for task in train)
    print0(
        f"rl from {meta['source']}: {config.num_iterations} steps of {config.problems} x {config.samples} answers; "
        f"{len(rollouts.places):,} problems of {task_names}"
    )
    trainer.prepare_model(model, config, compute)
    total_batch_size = config.problems * config.samples * T  # at most: answers are shorter than the context
    lr_scales = recipe.learning_rate_scales(total_batch_size, config.init_lr_frac)
    facts = {
        "dataset": meta["dataset"],
        "depth": meta["depth"],
        "source": meta["source"],
        # a run goes on only with the same rollouts: see run.IDENTITY
        "rollouts": {
            "problems": config.problems,
            "samples": config.samples,
            "max_new_tokens": config.max_new_tokens,
            "tasks": task_names,
        },
    }
    run = Run(
        stage="rl",
        tag=config.model_tag or meta["tag"],
        config=config,
        model=model,
        optimizer=trainer.make_optimizer(model, config, lr_scales, config.weight_decay or 0.0, compute),
        tokenizer=tokenizer,
        compute=compute,
        num_iterations=config.num_iterations,
        meta=describe(config, model, tokenizer, total_batch_size, config.num_iterations, facts),
    )
    batch = trainer.choose_device_batch(run, config.problems * config.samples // compute.world_size)
    val_loader = RowLoader(
        conversation_rows("rl_val", held_out, tokenizer, T, compute),
        batch.rows * compute.world_size,
        batch.rows,
        seed=0,
        rank=compute.rank,
        world_size=compute.world_size,
        device=compute.device,
    )
    progress = start_or_resume(run)
    first_step = progress.step

    model.eval()  # and so it stays: what is trained must be what has sampled, without dropout
    with stop_signals() as stop, contextlib.closing(open_log(run, first_step)) as log:
        while True:
            step = progress.step
            last = step == config.num_iterations

            # Save before evaluating: a crash in the evaluation then costs no training.
            if last or trainer.is_due(step, config.save_every or config.eval_every):
                save(run, progress)
            # Unlike pretraining, RL is evaluated at step 0 too: what it gains is the difference to the SFT model.
            evaluated_before = step == first_step and progress.val_bpb is not None  # by the run that we resume
            if (last or step == 0 or trainer.is_due(step, config.eval_every)) and not evaluated_before:
                bpb = trainer.validation_bpb(run, step, val_loader)
                record_evaluation(run, progress, log, {"val_bpb": bpb, "tasks": rollouts.evaluate(step)})
            # Prune after evaluating, which may have found a new best checkpoint.
            if step == progress.saved_step and compute.rank == 0:
                checkpoint.prune("rl", run.tag, config.keep)
            if last:
                break
            # Signals reach ranks at different times; they stop together, at the same step.
            if compute.any_rank(stop.requested):
                save(run, progress)
                raise KeyboardInterrupt

            log.write(train_step(run, progress, rollouts, batch.rows))
    write_run_record(run, progress, plan=dataclasses.asdict(batch))
    compute.close()


def train_step(run: Run, progress: Progress, rollouts: "Rollouts", rows: int) -> dict[str, Any]:
    """Sample a step's answers and learn from them, `rows` answers at a time; return the step's metrics.

    Where no group's rewards differ, on any rank, the step changes nothing. Raises ValueError when the loss is not
    finite or memory runs out.
    """
    began = time.perf_counter()
    step = progress.step
    compute = run.compute
    lr_mult = trainer.learning_rate_multiplier(run, step)
    micro_batches, n_sampled, metrics = rollouts.batch(step, rows)
    scores: dict[str, float] = {}
    mean_loss = 0.0
    if micro_batches:
        counts = torch.stack([(targets_BT >= 0).sum() for _, targets_BT, _ in micro_batches])
        n_targets = compute.all_reduce_sum(counts.sum().float()).clamp(min=1)
        totals_2 = torch.zeros(2, device=compute.device)  # loss, and mean negative log-likelihood of what is trained
        with trainer.explain_out_of_memory(rows):
            for idx_BT, targets_BT, weights_BT in micro_batches:
                nll_BT = run.model(idx_BT, targets_BT, loss_reduction="none")
                # -A · log p summed over tokens. Weights are divided by all ranks' tokens, so gradients only add up.
                loss = (nll_BT * weights_BT).sum()
                loss.backward()
                totals_2 += torch.stack([loss.detach(), nll_BT.detach().sum() / n_targets])
            mean_loss, scores["nll"] = compute.all_reduce_sum(totals_2).tolist()
            if not math.isfinite(mean_loss):
                raise diverged(run, step, f"loss is {mean_loss} at step {step}")
            grad_norm = trainer.update_weights(run, step, lr_mult)
        if grad_norm is not None:
            scores["grad_norm"] = grad_norm
    compute.synchronize()
    dt = time.perf_counter() - began
    line = finish_step(run, progress, loss=mean_loss, lr_mult=lr_mult, tokens=n_sampled, dt=dt)
    line["mfu"] = None  # the model's training FLOPs say nothing of sampling
    return {**line, **metrics, **scores}


@dataclass(frozen=True)
class Group:
    """The answers sampled to one problem, and their rewards; empty where the problem cannot be asked."""

    requests: list[Request]
    rewards: list[float]

    @property
    def advantages(self) -> list[float]:
        """Each reward less the group's mean: all zero where the rewards are equal."""
        return [reward - sum(self.rewards) / len(self.rewards) for reward in self.rewards]


class Rollouts:
    """Samples answers to problems. What a step asks and draws follows from (seed, step) alone.

    places: all training problems, which `train` has. Every rank has the same, and answers its own share of a step's.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, train: Tasks, test: Tasks, config: RLConfig, compute: Compute
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.test = test
        self.config = config
        self.compute = compute
        self.places: list[Problem] = [(task, index) for task in train for index in range(len(task))]

    def problems(self, step: int) -> dict[str, Problem]:
        """Return a step's problems over all ranks, by name. Each comes once per epoch, each epoch in another order."""
        first = step * self.config.problems
        where = [divmod(i, len(self.places)) for i in range(first, first + self.config.problems)]
        orders = {}
        for epoch in {epoch for epoch, _ in where}:
            shuffle = random.Random(f"rl {self.config.seed} {epoch}")
            orders[epoch] = shuffle.sample(self.places, len(self.places))
        return {f"{step} {slot}": orders[epoch][place] for slot, (epoch, place) in enumerate(where)}

    def sample(self, problems: dict[str, Problem], n: int) -> list[Group]:
        """Sample `n` answers to each of this rank's share of the problems; none to one that is malformed or too long.

        An answer follows from the model, the problem, its name and the answer's number, and so not from the batch or
        the rank that it is sampled in.
        """
        self.model.eval()
        # A new engine, for the weights have changed: nothing that was cached of the old ones may be used.
        engine = Engine(self.model, self.tokenizer, max_batch=self.config.rollout_batch_size)
        mine = list(problems.items())[self.compute.rank :: self.compute.world_size]
        asked = []
        for name, (task, index) in mine:
            conversation = task[index]
            asked.append((task, conversation, self.requests(conversation, name, n)))
        # Eager: sampling reads batches of ever new lengths.
        with torch.compiler.set_stance("force_eager"):
            engine.run([request for _, _, requests in asked for request in requests])
        groups = []
        for task, conversation, requests in asked:
            rewards = [judge(task, conversation, request, self.tokenizer) for request in requests]
            groups.append(Group(requests, rewards))
        return groups

    def requests(self, conversation: dict[str, Any], name: str, n: int) -> list[Request]:
        """Return `n` requests for answers to a conversation's question; none where it cannot be asked."""
        longest = self.config.max_new_tokens
        try:
            prompt = render_for_completion(conversation, self.tokenizer)
        except ValueError:
            return []
        if len(prompt) > self.model.config.sequence_len - longest:
            return []
        seed = random.Random(f"rl {self.config.seed} {name}").getrandbits(62)
        return [Request(prompt, max_tokens=longest, seed=seed, sample=i) for i in range(n)]

    def batch(self, step: int, rows: int) -> tuple[list[MicroBatch], int, dict[str, Any]]:
        """Sample a step's answers; return micro-batches of at most `rows`, the number of tokens sampled, and metrics.

        Raises ValueError when no problem of the step leaves room for an answer.
        """
        config = self.config
        began = time.perf_counter()
        groups = self.sample(self.problems(step), config.samples)
        totals = count(groups, self.compute)
        if not totals["answers"]:
            raise ValueError(
                f"--max-new-tokens {config.max_new_tokens} leaves room for no problem of step {step} in "
                f"{self.model.config.sequence_len} tokens"
            )
        micro_batches = make_micro_batches(groups, totals["tokens"], rows, self.compute.device)
        if totals["useful"] and not micro_batches:
            # Other ranks have something to learn from, and wait for this one's gradients: they are zero.
            zeros_BT = torch.zeros(1, 1, dtype=torch.int64, device=self.compute.device)
            micro_batches = [(zeros_BT, zeros_BT - 1, zeros_BT.float())]
        metrics = {
            "epoch": step * config.problems // len(self.places),
            "reward": totals["reward"] / totals["answers"],
            "useful": totals["useful"] / config.problems,  # share of groups whose rewards differ
            "answer_tokens": totals["tokens"] / totals["answers"],
            "cut_off": totals["cut_off"] / totals["answers"],
            "unusable": int(totals["unusable"]),
            "sampling_dt": time.perf_counter() - began,
        }
        return micro_batches, int(totals["tokens"]), metrics

    def evaluate(self, step: int) -> dict[str, Any]:
        """Return of each test task the accuracy of greedy answers and pass@k of sampled ones, with errors."""
        compute = self.compute
        config = self.config
        records = {}
        for task in self.test:
            n = min(config.eval_problems, len(task))
            record = evaluate_task(
                task,
                self.model,
                self.tokenizer,
                Engine(self.model, self.tokenizer, max_batch=config.rollout_batch_size),
                max_problems=n,
                max_new_tokens=config.max_new_tokens,
                compute=compute,
            )
            record.pop("samples")
            groups = self.sample({f"test {task.name} {i}": (task, i) for i in range(n)}, PASS_AT[-1])
            own = [sum(group.rewards) for group in groups]
            right_N = torch.zeros(n, device=compute.device)
            right_N[compute.rank :: compute.world_size] = torch.tensor(own, device=compute.device)
            rights = [int(right) for right in compute.all_reduce_sum(right_N).tolist()]
            record["pass_at_k"] = pass_rates(rights, PASS_AT[-1], PASS_AT)
            scores = {"accuracy": record, **{f"pass@{k}": rate for k, rate in record["pass_at_k"].items()}}
            shown = [f"{name} {100 * s['accuracy']:.1f} ± {100 * s['stderr']:.1f} %" for name, s in scores.items()]
            print0(f"step {step}: {task.name}, {n} problems: {', '.join(shown)}")
            records[task.name] = record
        return records


def judge(task: Any, conversation: dict[str, Any], request: Request, tokenizer: Tokenizer) -> float:
    """Return 1 for an answer that is right, ends by itself, and whose tool results are the tool's own; else 0.

    Without the last rule a model learns to write <|output_start|> itself, and with it any result that it likes.
    """
    ended = request.stop_token == tokenizer.encode_special("<|assistant_end|>")
    results = {tokenizer.encode_special(mark) for mark in ("<|output_start|>", "<|output_end|>")}
    forged = any(token in results and sampled for token, sampled in zip(request.output, request.mask, strict=True))
    return float(ended and not forged and task.evaluate(conversation, tokenizer.decode(request.output)))


def sampled_row(request: Request) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt and its answer, and their mask: 1 = sampled by the model.

    The token that ended the answer was sampled too. The tool's results were not, and are never trained on.
    """
    end = [] if request.stop_token is None else [request.stop_token]
    ids = [*request.tokens, *request.output, *end]
    mask = [0] * len(request.tokens) + request.mask + [1] * len(end)
    return ids, mask


def count(groups: Sequence[Group], compute: Compute) -> dict[str, float]:
    """Count the groups that cannot be asked and the useful ones, their answers, rewards and tokens, over all ranks."""
    answers = [request for group in groups for request in group.requests]
    own = {
        "unusable": sum(not group.requests for group in groups),
        "useful": sum(any(group.advantages) for group in groups),
        "reward": sum(sum(group.rewards) for group in groups),
        "answers": len(answers),
        "tokens": sum(sum(sampled_row(answer)[1]) for answer in answers),
        "cut_off": sum(answer.finish_reason == "length" for answer in answers),
    }
    totals = compute.all_reduce_sum(torch.tensor(list(own.values()), dtype=torch.float32, device=compute.device))
    return dict(zip(own, totals.tolist(), strict=True))


def make_micro_batches(groups: Sequence[Group], n_tokens: float, rows: int, device: torch.device) -> list[MicroBatch]:
    """Return all answers that have an advantage as (inputs_BT, targets_BT, weights_BT), `rows` of them at a time.

    A weight is the answer's advantage over `n_tokens`; the target of a token that was not sampled is -1.
    """
    answers = []
    for group in groups:
        for request, advantage in zip(group.requests, group.advantages, strict=True):
            if advantage:
                ids, mask = sampled_row(request)
                target_ids = [token if sampled else -1 for token, sampled in zip(ids, mask, strict=True)]
                weights_T = torch.full((len(ids) - 1,), advantage / n_tokens)
                answers.append((torch.tensor(ids[:-1]), torch.tensor(target_ids[1:]), weights_T))
    # The longest first: rows of about the same length then share a micro-batch, and need little padding.
    answers.sort(key=lambda answer: -len(answer[0]))
    micro_batches = []
    for start in range(0, len(answers), rows):
        inputs, targets, weights = zip(*answers[start : start + rows], strict=True)
        idx_BT = pad_sequence(list(inputs), batch_first=True)
        targets_BT = pad_sequence(list(targets), batch_first=True, padding_value=-1)
        weights_BT = pad_sequence(list(weights), batch_first=True)
        micro_batches.append((idx_BT.to(device), targets_BT.to(device), weights_BT.to(device)))
    return micro_batches
