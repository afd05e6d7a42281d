"""Chat tasks: categorical ones are scored by the letters' logits, generative ones by what the model writes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from nanochat.compute import Compute
from nanochat.conversation import render_for_completion
from nanochat.core_eval import accuracy_record
from nanochat.spans import pad_right

SAMPLES = 3  # conversations a task keeps for the report


def _last_question(conversation: dict[str, Any]) -> str:
    content = next(m["content"] for m in reversed(conversation["messages"]) if m["role"] == "user")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _prompt(conversation: dict[str, Any], tokenizer: Any, limit: int) -> list[int]:
    """The conversation up to the answer, in at most `limit` tokens: BOS and the end of it."""
    ids = render_for_completion(conversation, tokenizer)
    return ids if len(ids) <= limit else [ids[0], *ids[len(ids) - limit + 1 :]]


def choose_letters(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], letters: Sequence[Sequence[str]]
) -> list[str]:
    """For each prompt the letter that the model finds likeliest as the next token; the first of equals.

    prompts: token ids, of any lengths; letters: those to choose from, a prompt. Nothing is sampled, and tokens other
    than the letters do not count. Raises ValueError when a letter is not a single token.
    """
    last_B = torch.tensor([len(ids) - 1 for ids in prompts])
    logits_BV = model(pad_right(prompts).to(model.device))[torch.arange(len(prompts)), last_B].float().cpu()
    answers = []
    for logits_V, choices in zip(logits_BV, letters):
        ids = tokenizer.encode(list(choices))
        if any(len(token) != 1 for token in ids):
            raise ValueError(
                f"letters {list(choices)} must be one token each: retrain with `python -m scripts.tok_train`"
            )
        answers.append(choices[max(range(len(choices)), key=lambda i: logits_V[ids[i][0]].item())])
    return answers


@torch.no_grad()
def evaluate_task(
    task: Any,
    model: Any,
    tokenizer: Any,
    engine: Any,
    max_problems: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    compute: Compute | None = None,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """Ask the model every problem of a task (the first `max_problems`) and count the right answers.

    task: a `tasks.common.Task`; a categorical one needs no engine. Ranks share the problems and return the same
    numbers. A prompt too long for the context loses its beginning. progress wraps the batches, as tqdm does.
    Returns an `accuracy_record` with `samples`: the first few {question, answer, correct}.
    """
    n = len(task) if max_problems is None else min(max_problems, len(task))
    if n < 1:
        raise ValueError(f"task {task.name}: no problems to evaluate")
    rank, ranks = (compute.rank, compute.world_size) if compute else (0, 1)
    mine = list(range(rank, n, ranks))
    categorical = task.eval_type == "categorical"
    context = model.config.sequence_len
    limit = context if categorical else max(context - max_new_tokens, context // 2)
    chunk = batch_size if categorical else 4 * batch_size  # the engine refills its own batch as answers end
    correct, samples = 0, []
    for start in progress(range(0, len(mine), chunk)):
        batch = [task[i] for i in mine[start : start + chunk]]
        prompts = [_prompt(conversation, tokenizer, limit) for conversation in batch]
        if categorical:
            answers = choose_letters(model, tokenizer, prompts, [conversation["letters"] for conversation in batch])
        else:
            completions = engine.complete(prompts, max_tokens=max_new_tokens, temperature=temperature)
            answers = [tokenizer.decode(ids) for ids in completions]
        for conversation, answer in zip(batch, answers):
            right = bool(task.evaluate(conversation, answer))
            correct += right
            if len(samples) < SAMPLES:
                samples.append({"question": _last_question(conversation), "answer": answer, "correct": right})
    if compute:
        correct = compute.all_reduce_sum(torch.tensor(correct, device=compute.device)).item()
    return {**accuracy_record(correct, n, task.baseline), "samples": samples}


def chat_core(records: Iterable[dict[str, Any]]) -> float:
    """ChatCORE: the mean centred accuracy of the tasks' records, 0 for guessing and 1 for all right."""
    centered = [record["centered"] for record in records]
    return sum(centered) / len(centered)
