"""Reinforcement learning on tasks that tell a right answer from a wrong one, by group-relative policy gradient.

The model samples a group of answers to each problem, and each answer gets a reward: 1 if it is right, else 0. Its
advantage A is the reward less the mean of its group. The loss of a step is the sum of -A · log p over all tokens that
the model itself sampled, divided by their number in the whole step, over all groups, micro-batches and ranks:

    rewards 1 0 0 1  ->  advantages +0.5 -0.5 -0.5 +0.5     make right answers likelier and wrong ones less likely
    rewards 1 1 1 1  ->  advantages  0    0    0    0       nothing to learn: all are as good

This is REINFORCE with the group's mean as baseline, or GRPO (arXiv 2402.03300) with three things left out. The division
by the group's standard deviation and by each answer's length bias it (Dr. GRPO, arXiv 2503.20783); the mean over the
tokens of a batch is DAPO's (arXiv 2503.14476). A batch is used for one update, by the very model that sampled it, so
there is no ratio to clip. There is no reference model to stay near, and so no KL term.

`reinforce` is the loop. A step's problems and answers follow from (seed, step), so a resumed run is equal bit for bit.
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
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from nanochat import recipe, trainer
from nanochat.attention import BLOCK
from nanochat.chat_eval import Sampling, evaluate_task, pass_rates
from nanochat.cli import option, require_positive
from nanochat.common import print0
from nanochat.compute import Compute
from nanochat.conversation import render_for_completion
from nanochat.device_batch import DeviceBatch, choose_device_batch, explain_out_of_memory
from nanochat.engine import Engine, Request
from nanochat.finetune import Conversations, SourceConfig, continue_from, conversation_rows, load_source
from nanochat.loss import IGNORED
from nanochat.run import Run
from nanochat.stopping import abandoned_on_signal, stop_if_requested, stop_on_signals
from nanochat.tokenizer import Tokenizer

PASS_AT = (1, 4, 8)  # the last is the number of answers sampled to each test problem
PROGRESS_LINES = 4  # in the evaluation of a task

MicroBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # inputs_BT, targets_BT, weights_BT
Problem = tuple[Any, int]  # a tasks.common.Task and the place of one of its conversations


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


@dataclass(frozen=True)
class Group:
    """The answers sampled to one problem, and their rewards; empty where the problem cannot be asked."""

    requests: list[Request]
    rewards: list[float]

    @property
    def advantages(self) -> list[float]:
        """Each reward less the group's mean: all zero where the rewards are equal."""
        return [reward - sum(self.rewards) / len(self.rewards) for reward in self.rewards]


def reinforce(config: RLConfig, train: Sequence[Any], test: Sequence[Any], held_out: Conversations) -> None:
    """Train the newest SFT model on the tasks `train`, of tasks.common.Task, and save it as stage rl.

    test: other problems of the same tasks, for evaluation alone. held_out: conversations whose bits per byte say
    whether the model forgets what it is not rewarded for. Raises ValueError when there is no SFT model.
    """
    compute = Compute.create(config.device_type)
    if config.problems % compute.world_size:
        raise ValueError(f"--problems {config.problems}: make it a multiple of the {compute.world_size} processes")
    source = load_source("sft", "rl", config, compute)
    model = source.model
    T = model.config.sequence_len
    problems = [(task, index) for task in train for index in range(len(task))]
    task_names = ", ".join(task.name for task in train)
    print0(
        f"rl from {source.name}: {config.num_iterations} steps of {config.problems} x {config.samples} answers; "
        f"{len(problems):,} problems of {task_names}"
    )

    rollouts = {  # a run is resumed only with the same ones, see run.IDENTITY
        "problems": config.problems,
        "samples": config.samples,
        "max_new_tokens": config.max_new_tokens,
        "tasks": task_names,
    }
    most_tokens = config.problems * config.samples * T  # of a step, as answers are shorter than the context
    run = continue_from(
        source, "rl", config, compute, most_tokens, config.num_iterations, more_facts={"rollouts": rollouts}
    )
    share = config.problems * config.samples // compute.world_size
    batch = choose_device_batch(model, config, compute, share)
    val_rows = conversation_rows("rl_val", held_out, source.tokenizer, T, compute)
    val_loader = trainer.validation_loader(val_rows, batch.rows, compute)

    run.start_or_resume()
    model.eval()  # and so it stays: what is trained must be what has sampled, without dropout
    with stop_on_signals(run), explain_out_of_memory(batch.rows), contextlib.closing(run):
        while True:
            step = run.step
            last = step == run.num_iterations

            # As in pretraining (trainer.py says why): save, evaluate, prune.
            if last or trainer.is_due(step, config.save_every or config.eval_every):
                run.save()
            # Step 0 is evaluated too: what RL gains is the difference to the SFT model.
            if (last or step == 0 or trainer.is_due(step, config.eval_every)) and run.evaluated_step != step:
                with abandoned_on_signal(run):
                    scores = trainer.validation_scores(run, val_loader)
                    tasks = evaluate(run, config, test)
                run.record_evaluation({**scores, "tasks": tasks})
            run.prune()
            if last:
                break

            began = time.perf_counter()
            lr_mult = recipe.learning_rate_multiplier(step, run.num_iterations, config)
            mean_loss = 0.0
            with abandoned_on_signal(run):
                chosen = problems_of_step(problems, config, step)
                groups = sample_groups(run, config, chosen, config.samples)
                totals = count(groups, compute)
                metrics = describe(totals, config, step)
                metrics["sampling_dt"] = time.perf_counter() - began
                stop_if_requested(run)
                # Where no group's rewards differ, on any rank, the step changes nothing.
                if totals["useful"]:
                    sums_2 = accumulate_policy_gradients(run, groups, totals, batch)
            if totals["useful"]:
                grad_norm = trainer.update_weights(run, lr_mult)
                if grad_norm is not None:
                    metrics["grad_norm"] = grad_norm
                # Read when the update is under way, as in pretraining.
                mean_loss, nll = read_sums(run, sums_2)
                metrics["nll"] = nll / totals["trained_tokens"]
            compute.synchronize()
            run.record_step(
                loss=mean_loss,
                lr_mult=lr_mult,
                tokens=int(totals["tokens"]),
                flops=None,  # the model's training FLOPs say nothing of sampling
                seconds=time.perf_counter() - began,
                epoch=step * config.problems // len(problems),
                more=metrics,
            )
    run.finish(plan=dataclasses.asdict(batch))
    compute.close()


# --- sampling


def problems_of_step(problems: list[Problem], config: RLConfig, step: int) -> dict[str, Problem]:
    """Return a step's problems over all ranks, by name. Each comes once per epoch, each epoch in another order."""
    orders: dict[int, list[Problem]] = {}  # of the one or two epochs that the step takes from
    chosen = {}
    for slot in range(config.problems):
        epoch, place = divmod(step * config.problems + slot, len(problems))
        if epoch not in orders:
            shuffle = random.Random(f"rl {config.seed} {epoch}")
            orders[epoch] = shuffle.sample(problems, len(problems))
        chosen[f"{step} {slot}"] = orders[epoch][place]
    return chosen


def sample_groups(run: Run, config: RLConfig, problems: dict[str, Problem], n: int) -> list[Group]:
    """Sample `n` answers to each of this rank's share of the problems, and judge them.

    An answer depends on the model, the problem, its name and the answer's number, not on its batch or its rank.
    """
    mine = list(problems.items())[run.compute.rank :: run.compute.world_size]
    asked = []
    all_requests = []
    for name, (task, index) in mine:
        conversation = task[index]
        requests = make_requests(run, config, conversation, name, n)
        asked.append((task, conversation, requests))
        all_requests += requests

    # A new engine, because the weights have changed: the prefix cache of an old one would be stale.
    engine = Engine(run.model, run.tokenizer, max_batch=config.rollout_batch_size)
    # Eager, because sampling meets ever new shapes, and each would be compiled anew.
    with torch.compiler.set_stance("force_eager"):
        engine.run(all_requests)

    groups = []
    for task, conversation, requests in asked:
        rewards = [judge(task, conversation, request, run.tokenizer) for request in requests]
        groups.append(Group(requests, rewards))
    return groups


def make_requests(run: Run, config: RLConfig, conversation: dict[str, Any], name: str, n: int) -> list[Request]:
    """Return `n` requests for answers to a conversation's question; none if it is malformed or leaves no room."""
    try:
        prompt = render_for_completion(conversation, run.tokenizer)
    except ValueError:
        return []
    if len(prompt) + config.max_new_tokens > run.model.config.sequence_len:
        return []
    seed = random.Random(f"rl {config.seed} {name}").getrandbits(62)
    return [Request(prompt, max_tokens=config.max_new_tokens, seed=seed, sample=i) for i in range(n)]


def judge(task: Any, conversation: dict[str, Any], request: Request, tokenizer: Tokenizer) -> float:
    """Return 1 for an answer that is right, ends by itself, and whose tool results are the tool's own; else 0.

    Without the last rule a model learns to write <|output_start|> itself, and with it any result that it likes.
    """
    ended = request.stop_token == tokenizer.encode_special("<|assistant_end|>")
    results = {tokenizer.encode_special(mark) for mark in ("<|output_start|>", "<|output_end|>")}
    forged = any(token in results and sampled for token, sampled in zip(request.output, request.mask, strict=True))
    return float(ended and not forged and task.evaluate(conversation, tokenizer.decode(request.output)))


def count(groups: Sequence[Group], compute: Compute) -> dict[str, float]:
    """Count the answers of a step, their rewards and their tokens, over all ranks."""
    own = dict.fromkeys(("unusable", "useful", "answers", "reward", "tokens", "trained_tokens", "cut_off"), 0.0)
    for group in groups:
        useful = any(group.advantages)  # the rewards differ, so there is something to learn
        own["useful"] += useful
        own["unusable"] += not group.requests
        own["answers"] += len(group.requests)
        own["reward"] += sum(group.rewards)
        for request in group.requests:
            _, sampled = sampled_row(request)
            own["tokens"] += sum(sampled)
            own["trained_tokens"] += sum(sampled) if useful else 0
            own["cut_off"] += request.finish_reason == "length"
    totals = compute.all_reduce_sum(torch.tensor(list(own.values()), device=compute.device))
    return dict(zip(own, totals.tolist(), strict=True))


def describe(totals: dict[str, float], config: RLConfig, step: int) -> dict[str, Any]:
    """Return a step's metrics of its answers. Raises ValueError when no problem leaves room for an answer."""
    if not totals["answers"]:
        raise ValueError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room in the context for any problem of step {step}"
        )
    return {
        "reward": totals["reward"] / totals["answers"],
        "useful": totals["useful"] / config.problems,
        "answer_tokens": totals["tokens"] / totals["answers"],
        "cut_off": totals["cut_off"] / totals["answers"],
        "unusable": int(totals["unusable"]),
    }


# --- learning


def accumulate_policy_gradients(
    run: Run, groups: Sequence[Group], totals: dict[str, float], batch: DeviceBatch
) -> torch.Tensor:
    """Run forward and backward over this rank's answers in micro-batches; return its parts of loss and likelihood."""
    sums_2 = torch.zeros(2, device=run.compute.device)  # loss, and negative log-likelihood of what is trained
    # Lengths vary, and each would be compiled anew, and leave memory of its own size with a GPU's allocator.
    multiple_of = BLOCK if run.config.compile or run.compute.device.type == "cuda" else 1
    micro_batches = make_micro_batches(groups, totals["tokens"], batch.rows, run.compute.device, multiple_of)
    # A rank that has nothing to learn from skips this loop; the optimizer takes its gradients for zeros.
    for idx_BT, targets_BT, weights_BT in micro_batches:
        nll_BT = run.model(idx_BT, targets_BT, loss_reduction="none", recompute=batch.recompute)
        # -A · log p summed over tokens. Weights are divided by all ranks' tokens, so gradients only add up.
        loss = (nll_BT * weights_BT).sum()
        loss.backward()
        sums_2 += torch.stack([loss.detach(), nll_BT.detach().sum()])
    return sums_2


def read_sums(run: Run, sums_2: torch.Tensor) -> tuple[float, float]:
    """Return loss and negative log-likelihood over all ranks. Raises ValueError when the loss is not finite."""
    mean_loss, nll = run.compute.all_reduce_sum(sums_2).tolist()
    if not math.isfinite(mean_loss):
        raise run.diverged(f"loss is {mean_loss} at step {run.step}")
    return mean_loss, nll


def make_micro_batches(
    groups: Sequence[Group], n_tokens: float, rows: int, device: torch.device, multiple_of: int = 1
) -> list[MicroBatch]:
    """Return all answers that have an advantage as (inputs_BT, targets_BT, weights_BT), `rows` of them at a time.

    A weight is the answer's advantage over `n_tokens`; the target of a token that was not sampled is IGNORED.
    multiple_of: rows are padded to a length that is a multiple of so many tokens.
    """
    answers = []
    for group in groups:
        for request, advantage in zip(group.requests, group.advantages, strict=True):
            if advantage:
                ids, sampled = sampled_row(request)
                target_ids = [token if own else IGNORED for token, own in zip(ids, sampled, strict=True)]
                weights_T = torch.full((len(ids) - 1,), advantage / n_tokens)
                answers.append((torch.tensor(ids[:-1]), torch.tensor(target_ids[1:]), weights_T))
    # The longest first: rows of about the same length then share a micro-batch, and need little padding.
    answers.sort(key=lambda answer: -len(answer[0]))
    micro_batches = []
    for start in range(0, len(answers), rows):
        inputs, targets, weights = zip(*answers[start : start + rows], strict=True)
        idx_BT = pad_sequence(list(inputs), batch_first=True)
        targets_BT = pad_sequence(list(targets), batch_first=True, padding_value=IGNORED)
        weights_BT = pad_sequence(list(weights), batch_first=True)
        missing = (0, -idx_BT.size(1) % multiple_of)
        idx_BT = F.pad(idx_BT, missing)
        targets_BT = F.pad(targets_BT, missing, value=IGNORED)
        weights_BT = F.pad(weights_BT, missing)
        micro_batches.append((idx_BT.to(device), targets_BT.to(device), weights_BT.to(device)))
    return micro_batches


def sampled_row(request: Request) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt and its answer, and for each id 1 if the model sampled it, else 0.

    The token that ended the answer was sampled too. The tool's results were not, and are never trained on.
    """
    end = [] if request.stop_token is None else [request.stop_token]
    ids = [*request.tokens, *request.output, *end]
    sampled = [0] * len(request.tokens) + request.mask + [1] * len(end)
    return ids, sampled


# --- evaluating


def evaluate(run: Run, config: RLConfig, test: Sequence[Any]) -> dict[str, Any]:
    """Return for each test task the accuracy of greedy answers and pass@k of sampled ones, with errors."""
    compute = run.compute
    records = {}
    for task in test:
        n = min(config.eval_problems, len(task))
        print0(f"step {run.step}: {task.name}, greedy answers to {n} problems")
        record = evaluate_task(
            task,
            run.model,
            run.tokenizer,
            Engine(run.model, run.tokenizer, max_batch=config.rollout_batch_size),
            max_problems=n,
            sampling=Sampling(max_new_tokens=config.max_new_tokens),
            compute=compute,
        )
        del record["samples"]

        # The same problems with sampled answers, judged as in training, and a line now and then: it may take minutes.
        rights: list[int] = []
        at_once = math.ceil(n / PROGRESS_LINES)
        for start in range(0, n, at_once):
            print0(f"step {run.step}: {task.name}, {PASS_AT[-1]} answers sampled to {start} of {n} problems")
            stop_if_requested(run)
            rights += count_right(run, config, task, range(start, min(start + at_once, n)))
        record["pass_at_k"] = pass_rates(rights, PASS_AT[-1], PASS_AT)

        shown = [f"accuracy {percent(record)}"]
        shown += [f"pass@{k} {percent(rate)}" for k, rate in record["pass_at_k"].items()]
        print0(f"step {run.step}: {task.name}, {n} problems: {', '.join(shown)}")
        records[task.name] = record
    return records


def count_right(run: Run, config: RLConfig, task: Any, places: Sequence[int]) -> list[int]:
    """Return how many of PASS_AT[-1] sampled answers to each of these problems are right; ranks share the problems."""
    compute = run.compute
    problems = {f"test {task.name} {i}": (task, i) for i in places}
    groups = sample_groups(run, config, problems, PASS_AT[-1])
    right_N = torch.zeros(len(places), device=compute.device)
    right_N[compute.rank :: compute.world_size] = torch.tensor([sum(group.rewards) for group in groups])
    return compute.all_reduce_sum(right_N).int().tolist()


def percent(score: dict[str, Any]) -> str:
    """Return an accuracy with its standard error, such as "93.0 ± 1.8 %"."""
    return f"{100 * score['accuracy']:.1f} ± {100 * score['stderr']:.1f} %"
