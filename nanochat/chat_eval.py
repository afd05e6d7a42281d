"""Chat tasks: categorical ones are scored by the letters' logits, generative ones by what the model writes."""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from nanochat.common import print0
from nanochat.compute import Compute, usable_cores
from nanochat.conversation import plain_text, render_for_completion
from nanochat.core_eval import accuracy_record, mean_centered
from nanochat.engine import Engine, Request
from nanochat.spans import Span, score_spans

Prompts = Sequence[list[int]]  # token ids of each
SAMPLES = 3  # conversations a task keeps for the report
# What ChatCORE is defined over, so that it compares with published numbers, where all six are there.
CHATCORE = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spellingbee")


def _last_question(conversation: dict[str, Any]) -> str:
    return plain_text(next(m for m in reversed(conversation["messages"]) if m["role"] == "user"))


def choose_letters(model: Any, tokenizer: Any, prompts: Prompts, letters: Sequence[Sequence[str]]) -> list[str]:
    """For each prompt the letter that the model finds likeliest as the next token; the first of equals.

    prompts: token ids, of any lengths; letters: those to choose from, a prompt. Nothing is sampled, and tokens other
    than the letters do not count. Raises ValueError when a letter is not a single token.
    """
    spans = []
    for prompt, choices in zip(prompts, letters, strict=True):
        for token in tokenizer.encode(list(choices)):
            if len(token) != 1:
                raise ValueError(f"letters {choices} must be one token each: retrain with scripts.tok_train")
            spans.append(Span([*prompt, *token], len(prompt)))
    scores = iter(score_spans(model, spans))
    logprobs = [{letter: next(scores).logprob for letter in choices} for choices in letters]
    return [max(of_letter, key=of_letter.__getitem__) for of_letter in logprobs]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that one of k answers, drawn from n with `correct` right ones, is right: unbiased (arXiv:2107.03374)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def pass_rates(counts: Sequence[int], n: int, ks: Iterable[int]) -> dict[str, dict[str, float]]:
    """pass@k by k: the mean over problems with `counts` right answers out of `n`, and its standard error over them."""
    rates = {}
    for k in ks:
        chances = [pass_at_k(n, count, k) for count in counts]
        error = statistics.pstdev(chances) / math.sqrt(len(chances))
        rates[str(k)] = {"accuracy": statistics.fmean(chances), "stderr": error}
    return rates


def _sampled(engine: Any, tokenizer: Any, prompts: Prompts, places: range, n: int, **settings: Any) -> list[str]:
    """`n` answers to each prompt; their random numbers follow from the problem's place in the task alone."""
    requests = [
        Request(ids, sample=place * n + i, **settings)
        for place, ids in zip(places, prompts, strict=True)
        for i in range(n)  # one after the other: the engine reads their prompt once
    ]
    engine.run(requests)
    return [tokenizer.decode(request.output) for request in requests]


def _fingerprint(task: Any, n: int) -> str:
    """A hash of the first `n` problems: answers of two models to the same ones can be compared one by one."""
    problems = (json.dumps(task[i]["messages"]).encode() for i in range(n))
    return hashlib.sha256(b"".join(problems)).hexdigest()[:16]


def _record(counts: Sequence[int], num_samples: int, pass_k: int | None, baseline: float) -> dict[str, Any]:
    """The record of problems with `counts` right answers out of `num_samples` each; errors are over problems."""
    record = accuracy_record(sum(counts) / num_samples, len(counts), baseline)
    if num_samples == 1:
        return {**record, "outcomes": "".join(map(str, counts))}
    rates = pass_rates(counts, num_samples, sorted({1, pass_k or 1}))
    return {**record, "stderr": rates["1"]["stderr"], "pass_at_k": rates, "num_samples": num_samples}


@torch.no_grad()
def evaluate_task(
    task: Any,
    model: Any,
    tokenizer: Any,
    engine: Engine | None,
    max_problems: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    num_samples: int = 1,
    pass_k: int | None = None,
    seed: int = 42,
    compute: Compute | None = None,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """Ask the model every problem of a task (the first `max_problems`), count the right; ValueError for none.

    task: a `tasks.common.Task`; a categorical one needs no engine, and ignores the settings of sampling. A prompt too
    long for the context loses its beginning. Ranks share batches that do not depend on their number, and return the
    same (rank 0 alone has samples). progress wraps the batches, as tqdm does.
    Returns an `accuracy_record` with `outcomes`, a 1 or 0 a problem in order (of several samples `num_samples` and
    `pass_at_k` instead), `fingerprint` (a hash of the problems), `skipped` (rows of the source that are no problems),
    `truncated` (prompts cut) and `samples`, the first few {question, answer, correct}.
    """
    n = len(task) if max_problems is None else min(max_problems, len(task))
    if n < 1:
        raise ValueError(f"task {task.name}: no problems to evaluate")
    rank, ranks = (compute.rank, compute.world_size) if compute else (0, 1)
    categorical = task.eval_type == "categorical"
    num_samples = 1 if categorical else num_samples
    context = model.config.sequence_len
    limit = context if categorical else max(context - max_new_tokens, context // 2)
    chunk = max(SAMPLES, 4 * batch_size // num_samples)  # the engine refills its own batch as answers end
    settings = {"max_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "seed": seed}
    counts_2N, samples = torch.zeros(2, n, dtype=torch.long), []  # right answers; whether the prompt was cut
    with ThreadPoolExecutor(max(1, usable_cores() // ranks)) as pool:  # for judges that wait for a program
        for start in progress(range(rank * chunk, n, ranks * chunk)):
            places = range(start, min(start + chunk, n))
            batch = [task[i] for i in places]
            whole = [render_for_completion(conversation, tokenizer) for conversation in batch]
            prompts = [ids if len(ids) <= limit else [ids[0], *ids[len(ids) - limit + 1 :]] for ids in whole]
            if categorical:
                letters = [conversation["letters"] for conversation in batch]
                answers = choose_letters(model, tokenizer, prompts, letters)
            else:
                answers = _sampled(engine, tokenizer, prompts, places, num_samples, **settings)
            asked = [conversation for conversation in batch for _ in range(num_samples)]
            right = [bool(verdict) for verdict in pool.map(task.evaluate, asked, answers)]
            counts_2N[0, places] = torch.tensor(right).view(-1, num_samples).sum(dim=1)
            counts_2N[1, places] = torch.tensor([len(ids) > limit for ids in whole]).long()
            if start == 0:
                judged = list(zip(asked, answers, right))[: SAMPLES * num_samples : num_samples]
                samples = [{"question": _last_question(c), "answer": a, "correct": r} for c, a, r in judged]
    if compute:
        counts_2N = compute.all_reduce_sum(counts_2N.to(compute.device))
    counts, cut = counts_2N.tolist()
    if any(cut):
        print0(
            f"{task.name}: {sum(cut)} of {n:,} prompts (the first is problem {cut.index(1)}) exceed the {limit} tokens "
            f"that the context has for them and lose their beginning"
        )
    record = {**_record(counts, num_samples, pass_k, task.baseline), "fingerprint": _fingerprint(task, n)}
    return {**record, "skipped": task.skipped, "truncated": sum(cut), "samples": samples}


def chat_core(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """ChatCORE of the tasks' records: the mean centred accuracy, 0 for guessing and 1 for all right, its standard
    error, and the tasks that it is of: the six of `CHATCORE` where all are there, else all that are."""
    names = list(CHATCORE) if set(CHATCORE) <= records.keys() else list(records)
    mean, error = mean_centered([records[name] for name in names])
    return {"chatcore": mean, "chatcore_stderr": error, "chatcore_tasks": names}
