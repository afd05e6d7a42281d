"""Every record on disk and each of its fields, in one place. `python -m nanochat.record_fields` prints it as a page.

dev/records.md is that page. A test holds the page and the records of small runs to this file, so it cannot go stale:

    name?       the field is not always there
    a.b         `b` of the object `a`, or of each object in the list `a`
    a.*.b       `b` of each value in `a`, whose keys are names such as those of tasks

A file whose lines are of several kinds has an entry for each kind, told apart by what stands after the colon.
"""

Fields = dict[str, str]  # name -> what it means

WHERE_FROM: Fields = {
    "commit": "of this repository; with + if files differed from it",
    "hardware.processor": "its name",
    "hardware.cores": "that the operating system sees",
    "hardware.gpu?": "name of the first GPU",
    "hardware.gpus?": "how many there are",
    "versions": "of Python and of the packages that numbers depend on",
    "date": "UTC, ISO 8601",
}

MODEL: Fields = {
    "stage": "base, mid, sft or rl",
    "tag": "the model's name, such as d12",
}

TRAINING: Fields = {
    **MODEL,
    "dataset": "name of the pretraining text",
    "data_hash?": "of the text or the conversations trained on; not in rl",
    "depth": "layers",
    "source?": "the checkpoint that fine-tuning began with, and the first digits of its weights' hash",
    "rollouts?": "in rl: problems, samples, tokens and tasks of a step",
    "model_config": "the model's shape: the fields of `GPTConfig`",
    "kernels": "which kernel computes what; a resumed run takes the same ones",
    "tokenizer_hash": "of the tokenizer trained with",
    "config": "every flag, null where it was not given",
    "total_batch_size": "tokens a step",
    "num_iterations": "steps in all",
    "val_bpb": "bits per byte of validation text at the newest evaluation, null before the first",
}

EVALUATION: Fields = {
    "val_bpb": "bits per byte of validation text",
    "val_loss": "nats per token of it",
    "val_perplexity": "e to the power of that",
}

ACCURACY: Fields = {
    "accuracy": "share that is right",
    "stderr": "its standard error, binomial",
    "n": "problems",
    "baseline": "accuracy of guessing",
    "centered": "0 for guessing, 1 for all right",
}


def within(name: str, fields: Fields) -> Fields:
    """Return fields of an object as fields of the record that has it under `name`."""
    return {f"{name}.{field}": text for field, text in fields.items()}


STEP: Fields = {
    "step": "the step just made, counted from 1",
    "loss": "mean over its targets, nats per token; in rl the policy's",
    "lr_mult": "factor on every learning rate, from the schedule",
    "tokens": "trained on so far",
    "tok_per_sec": "of this step",
    "mfu": "model FLOPs utilization; null where the device's peak is unknown, and in rl",
    "dt": "seconds of this step, waiting for rows included",
    "peak_mem_bytes": "most memory so far, of the device or, on CPU, of the process",
    "epoch": "passes over the rows that are complete",
    "grad_norm?": "norm of all gradients, with --grad-clip",
}

CHAT_TASK: Fields = {
    **ACCURACY,
    "outcomes?": "a digit for each problem, 1 if it is right; with one answer a problem",
    "num_samples?": "answers a problem, if more than one",
    "pass_at_k?": "chance that one of k answers is right, by k",
    "fingerprint": "hash of the problems: equal ones can be compared",
    "skipped": "rows of the source that made no problem",
    "truncated": "prompts that lost their beginning",
}

RECORDS: dict[str, Fields] = {
    "runs/STAGE/TAG/metrics.jsonl: a training step": STEP,
    "runs/STAGE/TAG/metrics.jsonl: a step of rl": {
        **STEP,
        "reward": "mean over the answers, 0 to 1",
        "useful": "share of the problems whose answers' rewards differ",
        "answer_tokens": "mean length of an answer",
        "cut_off": "share of the answers that the limit ended",
        "unusable": "problems without room for an answer",
        "sampling_dt": "seconds of `dt` that went into answers",
        "nll?": "negative log-likelihood of a trained token; not where nothing was useful",
    },
    "runs/STAGE/TAG/metrics.jsonl: an evaluation": {
        "step": "after which it was made",
        **EVALUATION,
        "tasks?": "in rl: accuracies on test problems, as in chat_eval",
    },
    "runs/STAGE/TAG/run.json": {
        **TRAINING,
        "parameters": "of the model",
        "plan": "rows of a micro-batch, micro-batches a step, and if activations are recomputed",
        "peak_mem_bytes": "most memory, of the device or, on CPU, of the process",
        "wall_seconds": "of all steps",
        "steady_seconds": "of the steps after the tenth",
        **WHERE_FROM,
    },
    "checkpoints/STAGE/TAG/step_N/meta.json": {
        **TRAINING,
        "step": "steps made",
        "tokens": "trained on so far",
        "seconds": "of all steps so far",
        "steady_seconds": "of those after the tenth",
        "val_loss?": "nats per token, once this step was evaluated",
        "val_perplexity?": "e to the power of that",
        "tasks?": "in rl: accuracies on test problems",
        "files": "SHA-256 of each file of the checkpoint",
    },
    "evals/base_eval_STAGE_TAG.json": {
        **MODEL,
        "step": "of the checkpoint, null for a model of others",
        "dataset": "whose text was measured",
        "train_bpb": "bits per byte of training text, null without a dataset",
        "val_bpb": "and of validation text",
        "train_loss?": "nats per token of training text",
        "val_loss?": "and of validation text",
        "train_perplexity?": "e to the power of train_loss",
        "val_perplexity?": "e to the power of val_loss",
        "bundle": "where the CORE tasks came from",
        "core.core_metric": "mean of the centered accuracies, null if no task ran",
        "core.core_stderr": "its standard error",
        "core.results": "accuracy by task",
        "core.centered_results": "0 for guessing, 1 for all right, by task",
        **within("core.details.*", ACCURACY),
        "core.details.*.outcomes": "a digit for each question, 1 if it is right",
        "core.details.*.shots": "solved examples before each question",
        "core.details.*.fewshot_from": "the file itself, or examples kept apart from it",
        "core.details.*.truncated": "questions that lost their beginning",
        "core.details.*.fingerprint": "hash of the questions",
        "core.details.*.bad_rows": "lines that made no question",
        "core.skipped": "why a task did not run, by task",
        "samples.prompt": "the beginning of a text",
        "samples.text": "how the model went on",
        **WHERE_FROM,
    },
    "evals/chat_eval_STAGE_TAG.json": {
        **MODEL,
        "step": "of the checkpoint",
        "chatcore": "mean of the centered accuracies",
        "chatcore_stderr": "its standard error",
        "chatcore_tasks": "the tasks it is the mean of",
        **within("tasks.*", CHAT_TASK),
        "skipped": "why a task did not run, by task",
        "samples.task": "the first problems of each task",
        "samples.question": "as the model was asked",
        "samples.answer": "what it said, tool calls included",
        "samples.correct": "true or false",
        **WHERE_FROM,
    },
    "evals/tok_train.json": {
        "stage": "tok_train",
        "config": "every flag",
        "vocab_size": "ids, special tokens included",
        "hash": "of the tokenizer",
        "documents": "learnt from",
        "chars": "learnt from",
        "seconds": "it took",
        "bytes_per_token": "on validation text",
        **WHERE_FROM,
    },
    "evals/tok_eval.json": {
        "stage": "tok_eval",
        "hash": "of the tokenizer",
        "vocab_sizes": "by tokenizer: ours, and those of others in tiktoken's cache",
        "texts.*.bytes": "of a kind of text",
        "texts.*.*.tokens": "that it becomes, by tokenizer",
        "texts.*.*.bytes_per_token": "more is better",
        "texts.*.*.ratio": "our bytes per token over this tokenizer's",
        **WHERE_FROM,
    },
    "datasets/NAME/manifest.json": {
        "name": "of the dataset",
        "source": "where the text is from",
        "licence": "of the text",
        "complete": "false while shards are still being downloaded",
        "shuffled?": "true if the source has shuffled its documents",
        "recipe?": "of the built-in text: seed, shards, and hashes of what makes it",
        "sources.file?": "of a folder: a file in it",
        "sources.role?": "train or val; test files are left out",
        "sources.bytes?": "its size",
        "sources.sha256?": "its hash",
        "n?": "of a folder: the most training shards, null for all",
        "counts.skipped": "documents without text",
        "counts.cleaned": "documents with NULs or undecodable bytes",
        "shards.file": "a shard",
        "shards.split": "train or val",
        "shards.sha256": "its hash",
        "shards.bytes": "its size",
        "shards.documents": "how many are in it, null until it has arrived",
    },
    "datasets/NAME/rows_TOKENIZER_T/SHARD/meta.json": {
        "rows": "of T token ids",
        "padding": "tokens at the end of the last row that are no text",
        "documents": "packed",
        "tokens": "packed, without BOS between pieces",
        "conversations": "true if rows have a loss mask",
        "dtype": "of a token id",
        "sha256": "of each file",
    },
    "tasks/NAME/SPLIT.manifest.json": {
        "source": "the hub's page",
        "licence": "of the data set",
        "files.file": "a downloaded file",
        "files.bytes": "its size",
        "files.sha256": "its hash",
    },
    "runs/stages.jsonl": {
        "stage": "of speedrun.sh",
        "tag": "of its run",
        "seconds": "it took, since it was started last",
    },
}


def page() -> str:
    """Return dev/records.md: a table of fields for each record, in Markdown."""
    parts = [
        "# Records on disk",
        "Written by `python -m nanochat.record_fields > dev/records.md`. All files are in the base directory,\n"
        "`$NANOCHAT_BASE_DIR`. A name with `?` is not always there; `a.b` is `b` of the object `a`, or of each object\n"
        "in the list `a`; in `a.*.b`, `*` is any name.",
    ]
    for record, fields in RECORDS.items():
        path, _, kind = record.partition(": ")
        title = f"## `{path}`, {kind}" if kind else f"## `{path}`"
        lines = [title, "", "| field | |", "|---|---|"]
        lines += [f"| `{name}` | {text} |" for name, text in fields.items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(page())
