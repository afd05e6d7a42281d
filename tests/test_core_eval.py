"""CORE against prompts written by hand and against a plain scorer: one sequence at a time, no padding, no batch."""

import json
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.compute import Compute
from nanochat.core_eval import (
    CoreTask,
    build_prompts,
    draw_examples,
    evaluate_core,
    read_rows,
    read_tasks,
    scored_sequences,
)
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import evaluate_bpb
from nanochat.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT.parent / "shared" / "data" / "eval_bundle"
needs_bundle = pytest.mark.skipif(not BUNDLE.is_dir(), reason="no ../shared/data/eval_bundle here")

CHOICE = {"query": "Sky?", "choices": ["blue", "black"], "gold": 0}
SCHEMA = {"context_options": ["The cat", "The dog"], "continuation": "barked.", "gold": 1}
CLOZE = {"context": " Two and two are ", "continuation": "four"}


def core_task(kind, delimiter=" ", shots=0, path=Path("none.jsonl"), baseline=0.0):
    return CoreTask("task", path, kind, shots, delimiter, baseline)


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return Tokenizer.train_from_iterator(["abc"], 265)


@pytest.fixture(scope="module")
def tokenizer():
    text = "the quick brown fox jumps over the lazy dog. Question: what is it? Answer: a fox and a dog. "
    paths = sorted(BUNDLE.glob("eval_data/*/*.jsonl"))
    return Tokenizer.train_from_iterator([text, *(p.read_text(encoding="utf-8")[:20_000] for p in paths)], 330)


def tiny_model(vocab_size, sequence_len):
    """Random weights in every tensor, so that no two options come out alike."""
    torch.manual_seed(0)
    config = GPTConfig(sequence_len=sequence_len, vocab_size=vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
    model = GPT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def write_bundle(folder, tasks):
    """tasks: label -> (kind, shots, baseline in percent, rows or None for no file)."""
    (folder / "eval_data").mkdir(parents=True)
    lines, table = ["icl_tasks:"], ["Eval Task,Random baseline"]
    for label, (kind, shots, baseline, rows) in tasks.items():
        lines += [f"- {{label: {label}, dataset_uri: {label}.jsonl, num_fewshot: [{shots}], icl_task_type: {kind}}}"]
        table.append(f"{label},{baseline}")
        if rows is not None:
            text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
            (folder / "eval_data" / f"{label}.jsonl").write_text(text)
    (folder / "core.yaml").write_text("\n".join(lines))
    (folder / "eval_meta_data.csv").write_text("\n".join(table) + "\n")
    return folder


def oracle_core(model, tokenizer, bundle, max_per_task):
    """The protocol once more from its definition: accuracy by task."""
    limit, accuracies = model.config.sequence_len, {}

    def log_probabilities(ids):  # of each token but the first, given those before it
        logits = model(torch.tensor([ids]))[0].double()
        return logits[:-1].log_softmax(-1)

    def tokens(text):
        return [tokenizer.get_bos_token_id(), *tokenizer.encode(text)]

    for task in read_tasks(bundle):
        rows = [json.loads(line) for line in task.path.read_text(encoding="utf-8").split("\n") if line]
        random.Random(1337).shuffle(rows)
        kept = rows[:max_per_task]
        right = 0
        for i, row in enumerate(kept):
            pool = kept if len(kept) - 1 >= task.shots else rows
            others = [r for j, r in enumerate(pool) if j != i]
            shown = random.Random(1234 + i).sample(others, min(task.shots, len(others)))
            prompt, d = "", task.delimiter
            for r in shown:
                if task.kind == "multiple_choice":
                    prompt += f"{r['query']}{d}{r['choices'][r['gold']]}\n\n"
                elif task.kind == "schema":
                    prompt += f"{r['context_options'][r['gold']]}{d}{r['continuation']}\n\n"
                else:
                    prompt += f"{r['context'].strip()}{d}{r['continuation']}\n\n"
            if task.kind == "language_modeling":
                bare = tokens((prompt + row["context"].strip() + d).rstrip())
                full = tokens(prompt + row["context"].strip() + d + row["continuation"])
                scored = len(full) - next((k for k in range(len(bare)) if bare[k] != full[k]), len(bare))
                full = full[-limit:]
                scored = min(scored, len(full) - 1)
                guesses = log_probabilities(full).argmax(-1).tolist()
                right += guesses[-scored:] == full[-scored:]
                continue
            if task.kind == "multiple_choice":
                options = [tokens(prompt + row["query"] + d + choice) for choice in row["choices"]]
                shared = 0
                while all(shared < len(o) and o[shared] == options[0][shared] for o in options):
                    shared += 1
                lengths = [len(o) - shared for o in options]
            else:
                options = [tokens(prompt + context + d + row["continuation"]) for context in row["context_options"]]
                shared = 0
                while all(shared < len(o) and o[-1 - shared] == options[0][-1 - shared] for o in options):
                    shared += 1
                lengths = [shared] * len(options)
            best, best_loss = 0, None
            for k, (option, length) in enumerate(zip(options, lengths)):
                option = option[-limit:]
                length = min(length, len(option) - 1)
                logp = log_probabilities(option)
                picked = [logp[t - 1, option[t]].item() for t in range(len(option) - length, len(option))]
                loss = -sum(picked) / length if length else math.nan
                if best_loss is None or loss < best_loss:
                    best, best_loss = k, loss
            right += best == row["gold"]
        accuracies[task.label] = right / len(kept)
    return accuracies


def test_prompts_by_hand():
    another = {"query": "Grass?", "choices": ["red", "green"], "gold": 1}
    assert build_prompts(core_task("multiple_choice", "\nAnswer: "), CHOICE, [another]) == [
        "Grass?\nAnswer: green\n\nSky?\nAnswer: blue",
        "Grass?\nAnswer: green\n\nSky?\nAnswer: black",
    ]
    example = {"context_options": ["The hen", "The cow"], "continuation": "mooed.", "gold": 1}
    assert build_prompts(core_task("schema"), SCHEMA, [example]) == [
        "The cow mooed.\n\nThe cat barked.",
        "The cow mooed.\n\nThe dog barked.",
    ]
    cloze = {"context": "One and one are\n", "continuation": "two"}
    assert build_prompts(core_task("language_modeling"), CLOZE, [cloze]) == [
        "One and one are two\n\nTwo and two are",
        "One and one are two\n\nTwo and two are four",
    ]


def test_scored_spans_by_hand(bytes_tokenizer):
    def spans(kind, row):
        ids = bytes_tokenizer.encode(build_prompts(core_task(kind), row, []), prepend="<|bos|>")
        return [bytes_tokenizer.decode(i[s:]) for i, s in zip(*scored_sequences(kind, ids))]

    assert spans("multiple_choice", CHOICE) == ["ue", "ack"]  # the choices share "bl"
    assert spans("schema", SCHEMA) == [" barked.", " barked."]
    assert spans("language_modeling", CLOZE) == [" four"]


def test_examples_are_other_rows_and_come_from_the_file_when_few_were_kept():
    rows = [{"id": i} for i in range(30)]
    for index in range(12):
        drawn = [row["id"] for row in draw_examples(rows, 12, index, 10)]
        assert drawn == random.Random(1234 + index).sample([i for i in range(12) if i != index], 10)
        few = [row["id"] for row in draw_examples(rows, 5, index, 10)]
        assert len(set(few)) == 10 and index not in few and max(few) >= 5
    assert draw_examples(rows[:1], 1, 0, 10) == []


def test_rows_are_shuffled_by_the_protocols_seed(tmp_path):
    rows = [{"context": str(i), "continuation": "x"} for i in range(20)]
    bundle = write_bundle(tmp_path, {"a": ("language_modeling", 0, 0, rows)})
    random.Random(1337).shuffle(rows)
    assert read_rows(read_tasks(bundle)[0]) == rows


def test_ties_go_to_the_first_and_scores_are_centred(tmp_path, bytes_tokenizer):
    rows = [{"query": str(i), "choices": list("abcd"), "gold": i % 4 and 2} for i in range(40)]
    schema = [{**SCHEMA, "gold": i % 2} for i in range(10)]
    bundle = write_bundle(tmp_path, {"four": ("multiple_choice", 0, 25, rows), "two": ("schema", 0, 50, schema)})
    result = evaluate_core(lambda idx_BT: torch.zeros(*idx_BT.shape, 265), bytes_tokenizer, bundle)
    assert result["results"] == {"four": 0.25, "two": 0.5}
    assert result["centered_results"] == {"four": 0.0, "two": 0.0} and result["core_metric"] == 0.0
    assert result["details"]["four"]["stderr"] == pytest.approx(math.sqrt(0.25 * 0.75 / 40))
    errors = [math.sqrt(0.25 * 0.75 / 40) / 0.75, math.sqrt(0.5 * 0.5 / 10) / 0.5]
    assert result["core_stderr"] == pytest.approx(math.sqrt(errors[0] ** 2 + errors[1] ** 2) / 2)


def test_a_model_that_knows_the_answers_scores_one(tmp_path, bytes_tokenizer):
    text = "Two and two are four"
    bundle = write_bundle(tmp_path, {"cloze": ("language_modeling", 0, 0, [CLOZE])})

    def recites(idx_BT, wrong_at=None):
        ids = torch.tensor(bytes_tokenizer.encode(text))
        logits_BTV = torch.zeros(*idx_BT.shape, 265)
        logits_BTV[:, torch.arange(len(ids)), ids] = 1.0
        if wrong_at is not None:
            logits_BTV[:, wrong_at, 0] = 2.0
        return logits_BTV

    assert evaluate_core(recites, bytes_tokenizer, bundle)["core_metric"] == 1.0
    last = len(text) - 1
    assert evaluate_core(lambda x: recites(x, wrong_at=last), bytes_tokenizer, bundle)["core_metric"] == 0.0
    # a mistake before the continuation does not matter
    assert evaluate_core(lambda x: recites(x, wrong_at=3), bytes_tokenizer, bundle)["core_metric"] == 1.0


@needs_bundle
@pytest.mark.parametrize(("context", "max_per_task"), [(128, 4), (2048, 2)])
def test_real_rows_score_as_the_oracle_does(tokenizer, context, max_per_task):
    model = tiny_model(tokenizer.get_vocab_size(), context)
    with torch.no_grad():
        expected = oracle_core(model, tokenizer, BUNDLE, max_per_task)
    result = evaluate_core(model, tokenizer, BUNDLE, max_per_task)
    assert result["results"] == expected and len(expected) == 22
    assert 0 < sum(expected.values()) < 22  # something was right and something wrong
    marked = {label for label, record in result["details"].items() if record["fewshot_from"] == "file"}
    assert marked == {task.label for task in read_tasks(BUNDLE) if task.shots >= max_per_task}


@needs_bundle
def test_every_task_runs_at_a_short_context_with_one_row(tokenizer):
    result = evaluate_core(tiny_model(tokenizer.get_vocab_size(), 128), tokenizer, BUNDLE, max_per_task=1)
    assert len(result["results"]) == 22 and result["skipped"] == {}
    assert result["details"]["squad"]["truncated"] == 1 and result["details"]["winograd"]["truncated"] == 0
    assert math.isfinite(result["core_metric"])


def test_a_task_that_cannot_run_says_why(tmp_path, bytes_tokenizer):
    bundle = write_bundle(
        tmp_path,
        {
            "fine": ("schema", 3, 50, [SCHEMA]),
            "gone": ("schema", 0, 50, None),
            "empty": ("schema", 0, 50, []),
            "odd": ("essay", 0, 0, [CLOZE]),
            "torn": ("schema", 0, 50, [SCHEMA, '{"context_options": ["a"']),
            "mixed": ("multiple_choice", 0, 25, [SCHEMA]),
            "beyond": ("multiple_choice", 0, 50, [{**CHOICE, "gold": 2}]),
        },
    )
    lines = []
    result = evaluate_core(tiny_model(265, 64), bytes_tokenizer, bundle, log=lines.append)
    assert list(result["results"]) == ["fine"] and result["details"]["fine"]["shots"] == 0
    reasons = {
        "gone": "missing",
        "empty": "no rows",
        "odd": "essay",
        "torn": "torn.jsonl:2",
        "mixed": ":1",
        "beyond": ":1",
    }
    assert result["skipped"].keys() == reasons.keys()
    assert all(reason in result["skipped"][label] for label, reason in reasons.items())
    assert len(lines) == 7
    (bundle / "eval_data" / "fine.jsonl").unlink()
    assert evaluate_core(tiny_model(265, 64), bytes_tokenizer, bundle)["core_metric"] is None


def test_a_wrong_bundle_is_one_clear_error(tmp_path, bytes_tokenizer):
    with pytest.raises(ValueError, match=r"core\.yaml is missing: --bundle"):
        evaluate_core(None, bytes_tokenizer, tmp_path)
    bundle = write_bundle(tmp_path / "b", {"a": ("schema", 0, 50, [SCHEMA])})
    with pytest.raises(ValueError, match="--max-per-task 0"):
        evaluate_core(None, bytes_tokenizer, bundle, max_per_task=0)
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n")
    with pytest.raises(ValueError, match=r"eval_meta_data\.csv do not fit"):
        evaluate_core(None, bytes_tokenizer, bundle)


def two_ranks():
    """What each process of the test below runs."""
    compute = Compute.create("cpu")
    tokenizer = Tokenizer.train_from_iterator(["abc"], 265)
    model = tiny_model(265, 64)
    result = evaluate_core(model, tokenizer, os.environ["BUNDLE"], compute=compute)
    rows = torch.arange(8 * 65).remainder(265).view(8, 65)[compute.rank :: compute.world_size]
    bpb = evaluate_bpb(model, [(rows[:, :-1], rows[:, 1:])], tokenizer.token_bytes, compute)
    compute.close()
    return {"core": result, "bpb": round(bpb, 4)}


def test_two_ranks_agree_with_one(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(21)]
    # seven rows, so that the ranks' shares differ
    rows = [{"query": words[i], "choices": words[7 + 2 * i : 9 + 2 * i], "gold": i % 2} for i in range(7)]
    bundle = write_bundle(tmp_path, {"words": ("multiple_choice", 2, 50, rows)})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = "import json, test_core_eval as t; print(json.dumps(t.two_ranks()))"

    def start(rank, world):
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "NANOCHAT_DTYPE": "float32"}
        place = {"RANK": str(rank), "WORLD_SIZE": str(world), "BUNDLE": str(bundle)}
        path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        environment = {**os.environ, **shared, **place, **path}
        return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)

    processes = [start(0, 2), start(1, 2), start(0, 1)]
    outputs = [json.loads(process.communicate(timeout=120)[0].strip().splitlines()[-1]) for process in processes]
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0]["core"]["details"]["words"]["n"] == 7
