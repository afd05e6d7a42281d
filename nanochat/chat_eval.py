"""Chat tasks: how many of a task's problems a chat model answers right, and ChatCORE over several tasks.

    categorical    multiple choice: the letter that the model finds likeliest as its next token; nothing is sampled
    generative     what the model writes, by the engine, with its tools; the task judges it

Both are counted the same way, with a standard error, and records of two models can be compared problem by problem.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from nanochat.common import print0
from nanochat.compute import Compute, usable_cores
from nanochat.conversation import plain_text, render_for_completion
from nanochat.core_eval import accuracy_record, mean_centered
from nanochat.engine import Engine, Request
from nanochat.spans import Span, score_questions

SAMPLES = 3  # conversations of a task that are kept for the report
# ChatCORE is defined over these, and compares with published numbers where all six are there.
CHATCORE = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spellingbee")


@dataclass(frozen=True)
class Sampling:
    """Settings for the answers to generative tasks. pass_k: report pass@K, estimated from `num_samples` answers."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    num_samples: int = 1
    pass_k: int = 1
    seed: int = 42


GREEDY = Sampling()


def choose_letters(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], letters: Sequence[Sequence[str]]
) -> list[str]:
    """Return for each prompt which of its letters the model finds likeliest as the next token; the first of equals.

    Tokens other than the letters do not count. Raises ValueError when a letter is not a single token.
    """
    questions = []
    for prompt, choices in zip(prompts, letters, strict=True):
        tokens = tokenizer.encode(list(choices))
        if any(len(ids) != 1 for ids in tokens):
            raise ValueError(f"letters {choices} must be one token each: retrain with scripts.tok_train")
        questions.append([Span([*prompt, *ids], start=len(prompt)) for ids in tokens])
    chosen = []
    for choices, scores in zip(letters, score_questions(model, questions), strict=True):
        best = max(range(len(choices)), key=lambda i: scores[i].logprob)
        chosen.append(choices[best])
    return chosen


def write_answers(
    engine: Engine, tokenizer: Any, prompts: Sequence[list[int]], places: Sequence[int], sampling: Sampling
) -> list[str]:
    """Return `num_samples` answers to each prompt, side by side.

    The random numbers of an answer follow from its problem's place in the task, and not from what else is asked.
    """
    requests = []
    for place, ids in zip(places, prompts, strict=True):
        for i in range(sampling.num_samples):  # side by side, so that the engine reads their prompt once
            request = Request(
                ids,
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                seed=sampling.seed,
                sample=place * sampling.num_samples + i,
            )
            requests.append(request)
    engine.run(requests)
    return [tokenizer.decode(request.output) for request in requests]


def shorten(ids: list[int], limit: int) -> list[int]:
    """Return a prompt without its oldest tokens, but with BOS in front, where it is longer than `limit`."""
    return ids if len(ids) <= limit else [ids[0], *ids[len(ids) - limit + 1 :]]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the chance that one of k answers, drawn from n with `correct` right ones, is right (arXiv:2107.03374)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def pass_rates(counts: Sequence[int], n: int, ks: Iterable[int]) -> dict[str, dict[str, float]]:
    """Return pass@k by k: the mean over problems with `counts` right answers out of `n`, and its standard error."""
    rates = {}
    for k in ks:
        chances = [pass_at_k(n, count, k) for count in counts]
        rates[str(k)] = {
            "accuracy": statistics.fmean(chances),
            "stderr": statistics.pstdev(chances) / math.sqrt(len(chances)),
        }
    return rates


@torch.no_grad()
def evaluate_task(
    task: Any,
    model: Any,
    tokenizer: Any,
    engine: Engine | None,
    max_problems: int | None = None,
    batch_size: int = 32,
    sampling: Sampling = GREEDY,
    compute: Compute | None = None,
) -> dict[str, Any]:
    """Ask the model the first `max_problems` problems of a task and count the right. Raises ValueError for none.

    task: a `tasks.common.Task`; a categorical one needs no engine and no sampling. A prompt too long for the context
    loses its beginning. Ranks share batches that do not depend on their number, and return the same (rank 0 alone has
    samples).
    Returns an `accuracy_record` with `outcomes`, a 1 or 0 per problem in order (of several samples `num_samples` and
    `pass_at_k` instead), `fingerprint` (a hash of the problems), `skipped` (rows of the source that are no problems),
    `truncated` (prompts cut) and `samples`, the first few {question, answer, correct}.
    """
    n = len(task) if max_problems is None else min(max_problems, len(task))
    if n < 1:
        raise ValueError(f"task {task.name}: no problems to evaluate")
    rank = compute.rank if compute else 0
    ranks = compute.world_size if compute else 1
    categorical = task.eval_type == "categorical"
    num_samples = 1 if categorical else sampling.num_samples
    # An answer gets the room that it may need, but at least half of the context is for the prompt.
    context = model.config.sequence_len
    limit = context if categorical else max(context - sampling.max_new_tokens, context // 2)
    chunk = max(SAMPLES, 4 * batch_size // num_samples)  # the engine refills its own batch as answers end
    right_N = torch.zeros(n, dtype=torch.long)  # right answers to each problem
    cut_N = torch.zeros(n, dtype=torch.long)  # 1 where the prompt was cut
    samples: list[dict[str, Any]] = []
    starts = range(rank * chunk, n, ranks * chunk)
    with ThreadPoolExecutor(max(1, usable_cores() // ranks)) as pool:  # for judges that wait for a program
        for start in tqdm(starts, desc=task.name, leave=False, disable=None if rank == 0 else True):
            places = range(start, min(start + chunk, n))
            problems = [task[i] for i in places]
            whole = [render_for_completion(problem, tokenizer) for problem in problems]
            prompts = [shorten(ids, limit) for ids in whole]
            if categorical:
                answers = choose_letters(model, tokenizer, prompts, [problem["letters"] for problem in problems])
            else:
                assert engine is not None, "a generative task needs an engine"
                answers = write_answers(engine, tokenizer, prompts, places, sampling)
            # Answers come problem by problem, `num_samples` of each.
            asked = [problem for problem in problems for _ in range(num_samples)]
            right = [bool(verdict) for verdict in pool.map(task.evaluate, asked, answers)]
            right_N[places] = torch.tensor(right).view(-1, num_samples).sum(dim=1)
            cut_N[places] = torch.tensor([len(ids) > limit for ids in whole]).long()
            if start == 0:
                for i in range(0, len(asked), num_samples)[:SAMPLES]:
                    question = last_question(asked[i])
                    samples.append({"question": question, "answer": answers[i], "correct": right[i]})
    if compute:
        right_N, cut_N = compute.all_reduce_sum(torch.stack([right_N, cut_N]).to(compute.device)).cpu()
    cut = cut_N.tolist()
    if any(cut):
        print0(
            f"{task.name}: {sum(cut)} of {n:,} prompts (the first is problem {cut.index(1)}) exceed the {limit} tokens "
            "that the context has for them and lose their beginning"
        )
    return {
        **_record(right_N.tolist(), num_samples, sampling.pass_k, task.baseline),
        "fingerprint": _fingerprint(task, n),
        "skipped": task.skipped,
        "truncated": sum(cut),
        "samples": samples,
    }


def _record(counts: Sequence[int], num_samples: int, pass_k: int, baseline: float) -> dict[str, Any]:
    """Return the record of problems with `counts` right answers out of `num_samples` each; errors are over problems."""
    record = accuracy_record(sum(counts) / num_samples, len(counts), baseline)
    if num_samples == 1:
        record["outcomes"] = "".join(map(str, counts))
    else:
        record["num_samples"] = num_samples
        record["pass_at_k"] = pass_rates(counts, num_samples, sorted({1, pass_k}))
        record["stderr"] = record["pass_at_k"]["1"]["stderr"]
    return record


def last_question(conversation: dict[str, Any]) -> str:
    questions = [message for message in conversation["messages"] if message["role"] == "user"]
    return plain_text(questions[-1])


def _fingerprint(task: Any, n: int) -> str:
    """Hash the first `n` problems: answers of two models to the same ones can be compared one by one."""
    problems = (json.dumps(task[i]["messages"]).encode() for i in range(n))
    return hashlib.sha256(b"".join(problems)).hexdigest()[:16]


def chat_core(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return ChatCORE of the tasks' records: the mean centered accuracy, 0 for guessing and 1 for all right.

    With its standard error, and the tasks that it is of: the six of `CHATCORE` where all are there, else all that are.
    """
    names = list(CHATCORE) if set(CHATCORE) <= records.keys() else list(records)
    mean, error = mean_centered([records[name] for name in names])
    return {"chatcore": mean, "chatcore_stderr": error, "chatcore_tasks": names}
