"""CORE against a plain scorer written from the paper's definitions: one example at a time, no batch, no cache."""

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
from core_bundle import (
    BUNDLE,
    CHOICE,
    CLOZE,
    ROOT,
    SCHEMA,
    Fixed,
    Foreign,
    needs_bundle,
    oracle_core,
    random_gpt2,
    tiny_model,
    write_bundle,
)

from nanochat import core_eval, hf
from nanochat.compute import Compute
from nanochat.core_eval import (
    CoreTask,
    build_prompts,
    draw_examples,
    evaluate_core,
    is_right,
    read_rows,
    read_tasks,
    scored_spans,
)
from nanochat.loss_eval import evaluate_loss
from nanochat.spans import Score, score_questions
from nanochat.tokenizer import Tokenizer


def core_task(kind):
    return CoreTask("task", Path("none.jsonl"), kind, 0, " ", 0.0)


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return Tokenizer.train_from_iterator(["abc"], 265)


@pytest.fixture(scope="module")
def tokenizer():
    text = "the quick brown fox jumps over the lazy dog. Question: what is it? Answer: a fox and a dog. "
    paths = sorted(BUNDLE.glob("eval_data/*/*.jsonl"))
    return Tokenizer.train_from_iterator([text, *(p.read_text(encoding="utf-8")[:20_000] for p in paths)], 800)


# --- the oracle ------------------------------------------------------------------------------------------------------


def all_questions(task, tokenizer, context, max_per_task):
    """Yield the spans of each of a task's first rows."""
    rows, _ = read_rows(task)
    for i in range(min(max_per_task, len(rows))):
        prompts = build_prompts(task, rows[i], draw_examples(rows, max_per_task, i, task.shots))
        yield scored_spans(task.kind, tokenizer.encode(prompts, prepend=tokenizer.get_bos_token_id()), context)


def check_against_the_oracle(model, plain_model, tokenizer, max_per_task):
    """Assert equal decisions and log-likelihoods; return our result."""
    expected = oracle_core(plain_model, tokenizer, BUNDLE, max_per_task)
    result = evaluate_core(model, tokenizer, BUNDLE, max_per_task)
    assert len(expected) == 22 and result["skipped"] == {}
    assert {label: record["outcomes"] for label, record in result["details"].items()} == {
        label: outcomes for label, (outcomes, _) in expected.items()
    }
    for label, (outcomes, _) in expected.items():
        assert result["results"][label] == outcomes.count("1") / len(outcomes)
    for task in read_tasks(BUNDLE):
        questions = list(all_questions(task, tokenizer, model.config.sequence_len, max_per_task))
        scores = [score.logprob for scores in score_questions(model, questions) for score in scores]
        assert scores == pytest.approx(expected[task.label][1], abs=1e-4), task.label
    outcomes = "".join(outcomes for outcomes, _ in expected.values())
    assert "0" in outcomes and "1" in outcomes
    return result


@needs_bundle
@pytest.mark.parametrize(("context", "max_per_task"), [(128, 4), (1024, 2)])
def test_real_rows_score_as_the_oracle_does(tokenizer, context, max_per_task):
    model = tiny_model(tokenizer.get_vocab_size(), context, 2)
    result = check_against_the_oracle(model, model, tokenizer, max_per_task)
    marked = {label for label, record in result["details"].items() if record["fewshot_from"] == "file"}
    assert marked == {task.label for task in read_tasks(BUNDLE) if task.shots >= max_per_task}


@needs_bundle
def test_open_weights_score_as_the_oracle_does_with_transformers(tokenizer, tmp_path):
    theirs = random_gpt2(tokenizer.get_vocab_size(), 256)
    theirs.save_pretrained(tmp_path)
    ours = hf.load_model(tmp_path, "cpu", torch.float32)
    result = check_against_the_oracle(ours, Foreign(theirs, 256), tokenizer, max_per_task=2)
    assert {record["n"] for record in result["details"].values()} == {2}


@needs_bundle
def test_log_likelihoods_are_those_of_lm_eval(tokenizer, tmp_path):
    """lm-evaluation-harness with the same model and the same tokens, on one task of each kind."""
    HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    model = random_gpt2(tokenizer.get_vocab_size(), 1024)
    model.save_pretrained(tmp_path)
    same_model = hf.load_model(tmp_path, "cpu", torch.float32)
    words = {f"t{i}": i for i in range(tokenizer.get_vocab_size())}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    harness = HFLM(model, tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="t0"), batch_size=4)
    for task in read_tasks(BUNDLE):
        if task.label not in ("arc_easy", "winograd", "jeopardy", "copa"):
            continue
        questions = list(all_questions(task, tokenizer, 1024, 12))
        asked = [(("", ""), ids[:start], ids[start:]) for spans in questions for ids, start in spans]
        theirs = harness._loglikelihood_tokens(asked, disable_tqdm=True)
        ours = [score for scores in score_questions(same_model, questions) for score in scores]
        assert [score.logprob for score in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
        assert [score.greedy for score in ours] == [greedy for _, greedy in theirs]


# --- spans -----------------------------------------------------------------------------------------------------------


def test_scored_spans_by_hand(bytes_tokenizer):
    def spans(kind, row, context=100):
        ids = bytes_tokenizer.encode(build_prompts(core_task(kind), row, []), prepend="<|bos|>")
        return [bytes_tokenizer.decode(ids[start:]) for ids, start in scored_spans(kind, ids, context)]

    assert spans("multiple_choice", CHOICE) == ["ue", "ack"]  # the choices share "bl"
    assert spans("schema", SCHEMA) == [" barked.", " barked."]
    assert spans("language_modeling", CLOZE) == [" four"]
    assert spans("language_modeling", CLOZE, context=6) == [" four"]
    assert spans("language_modeling", CLOZE, context=4) == ["our"]  # the first token has nothing before it
    assert spans("multiple_choice", CHOICE, context=3) == ["ue", "ck"]


def test_ties_go_to_the_first_and_nothing_to_score_wins_only_in_front():
    one, two, none = Score(-1.0, 1, True), Score(-4.0, 2, False), Score(0.0, 0, False)
    assert is_right([one, one, two], 0) and not is_right([one, one, two], 1)
    assert is_right([two, one], 1)
    assert is_right([none, one], 0) and is_right([one, none], 0)
    assert is_right([one], None) and not is_right([two], None) and not is_right([none], None)


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_scores_are_centred(tmp_path, bytes_tokenizer):
    rows = [{"query": str(i), "choices": list("abcd"), "gold": i % 4 and 2} for i in range(40)]
    schema = [{**SCHEMA, "gold": i % 2} for i in range(10)]
    bundle = write_bundle(tmp_path, {"four": ("multiple_choice", 0, 25, rows), "two": ("schema", 0, 50, schema)})
    result = evaluate_core(Fixed(torch.zeros(64, 265)), bytes_tokenizer, bundle)
    assert result["results"] == {"four": 0.25, "two": 0.5}
    assert result["centered_results"] == {"four": 0.0, "two": 0.0} and result["core_metric"] == 0.0
    assert result["details"]["four"]["stderr"] == pytest.approx(math.sqrt(0.25 * 0.75 / 40))
    errors = [math.sqrt(0.25 * 0.75 / 40) / 0.75, math.sqrt(0.5 * 0.5 / 10) / 0.5]
    assert result["core_stderr"] == pytest.approx(math.sqrt(errors[0] ** 2 + errors[1] ** 2) / 2)
    random.Random(1337).shuffle(rows)
    assert result["details"]["four"]["outcomes"] == "".join("0" if row["gold"] else "1" for row in rows)


def test_a_model_that_knows_the_answers_scores_one(tmp_path, bytes_tokenizer):
    text = "Two and two are four"
    bundle = write_bundle(tmp_path, {"cloze": ("language_modeling", 0, 0, [CLOZE])})

    def recites(wrong_at=None):
        ids = torch.tensor(bytes_tokenizer.encode(text))
        logits_TV = torch.zeros(64, 265)
        logits_TV[torch.arange(len(ids)), ids] = 1.0
        if wrong_at is not None:
            logits_TV[wrong_at, 0] = 2.0
        return Fixed(logits_TV)

    assert evaluate_core(recites(), bytes_tokenizer, bundle)["core_metric"] == 1.0
    last = len(text) - 1
    assert evaluate_core(recites(wrong_at=last), bytes_tokenizer, bundle)["core_metric"] == 0.0
    # a mistake before the continuation does not matter
    assert evaluate_core(recites(wrong_at=3), bytes_tokenizer, bundle)["core_metric"] == 1.0


def test_a_tokenizer_without_bos_will_do(tmp_path, bytes_tokenizer):
    class Bare:
        encode = staticmethod(bytes_tokenizer.encode)

        @staticmethod
        def get_bos_token_id():
            return None

    bundle = write_bundle(tmp_path, {"a": ("multiple_choice", 0, 50, [CHOICE]), "b": ("schema", 0, 50, [SCHEMA])})
    model = Fixed(torch.zeros(64, 265))
    assert evaluate_core(model, Bare, bundle)["core_metric"] == 0.0
    # Two options that share most are read as one row: the shared part but for its last token, then both branches
    # without their last token. Two that share less than half are read one after the other.
    assert [bytes(ids) for ids in model.read] == [b"Sky? b" + b"lu" + b"lac", b"The cat barked" + b"The dog barked"]


@needs_bundle
def test_every_task_runs_at_a_short_context_with_one_row(tokenizer):
    result = evaluate_core(tiny_model(tokenizer.get_vocab_size(), 128), tokenizer, BUNDLE, max_per_task=1)
    assert len(result["results"]) == 22 and result["skipped"] == {}
    assert result["details"]["squad"]["truncated"] == 1 and result["details"]["winograd"]["truncated"] == 0
    assert math.isfinite(result["core_metric"])


@pytest.mark.parametrize("context", [1, 2, 3])
def test_a_context_of_next_to_nothing_still_runs(tmp_path, bytes_tokenizer, context):
    tasks = {"a": ("multiple_choice", 1, 50, [CHOICE] * 3), "b": ("language_modeling", 1, 0, [CLOZE] * 3)}
    result = evaluate_core(tiny_model(265, context), bytes_tokenizer, write_bundle(tmp_path, tasks))
    assert {label: record["truncated"] for label, record in result["details"].items()} == {"a": 3, "b": 3}


def test_a_task_that_cannot_run_says_why_and_bad_rows_are_counted(tmp_path, bytes_tokenizer, capsys):
    bundle = write_bundle(
        tmp_path,
        {
            "fine": ("schema", 3, 50, [SCHEMA]),
            "gone": ("schema", 0, 50, None),
            "empty": ("schema", 0, 50, []),
            "odd": ("essay", 0, 0, [CLOZE]),
            "torn": ("schema", 0, 50, [SCHEMA, '{"context_options": ["a"', SCHEMA, CHOICE]),
            "mixed": ("multiple_choice", 0, 25, [SCHEMA]),
            "beyond": ("multiple_choice", 0, 50, [{**CHOICE, "gold": 2}] * 9 + [CHOICE]),
        },
    )
    result = evaluate_core(tiny_model(265, 64), bytes_tokenizer, bundle)
    lines = capsys.readouterr().out.splitlines()
    assert list(result["results"]) == ["fine", "torn", "beyond"] and result["details"]["fine"]["shots"] == 0
    assert [result["details"][label]["bad_rows"] for label in result["results"]] == [0, 2, 9]
    assert [result["details"][label]["n"] for label in result["results"]] == [1, 2, 1]
    reasons = {"gone": "missing", "empty": "is empty", "odd": "essay", "mixed": "mixed.jsonl:1"}
    assert result["skipped"].keys() == reasons.keys()
    assert all(reason in result["skipped"][label] for label, reason in reasons.items())
    torn, beyond = (next(line for line in lines if line.startswith(f"{label}: ")) for label in ("torn", "beyond"))
    assert "2 bad rows left out" in torn and "torn.jsonl:2: " in torn and "torn.jsonl:4: " in torn
    assert "9 bad rows left out" in beyond and "beyond.jsonl:3: " in beyond and beyond.endswith(" and 6 more")
    assert len(lines) == 9
    for label in result["results"]:
        (bundle / "eval_data" / f"{label}.jsonl").unlink()
    assert evaluate_core(tiny_model(265, 64), bytes_tokenizer, bundle)["core_metric"] is None


def test_a_wrong_call_is_one_clear_error(tmp_path, bytes_tokenizer):
    with pytest.raises(ValueError, match=r"core\.yaml is missing: --bundle"):
        evaluate_core(None, bytes_tokenizer, tmp_path)
    bundle = write_bundle(tmp_path / "b", {"a": ("schema", 0, 50, [SCHEMA])})
    with pytest.raises(ValueError, match="--max-per-task 0"):
        evaluate_core(None, bytes_tokenizer, bundle, max_per_task=0)


def words_bundle(folder, n, longest=9):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, longest))) for _ in range(3 * n)]
    rows = [{"query": words[i], "choices": words[n + 2 * i : n + 2 * i + 2], "gold": i % 2} for i in range(n)]
    cloze = [{"context": word, "continuation": word[:1]} for word in words[:n]]
    tasks = {"words": ("multiple_choice", 2, 50, rows), "cloze": ("language_modeling", 0, 0, [*cloze, "torn"])}
    return write_bundle(folder, tasks)


def start(function, **environment):
    """A process that prints what a function of this file returns."""
    code = f"import json, test_core_eval as t; print(json.dumps(t.{function}()))"
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **path, **environment}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory():
    """What the process of the test below runs: resident bytes after each window of rows of ever new lengths."""
    compute, sizes = Compute.create("cpu"), []
    model = tiny_model(265, 512).to(compute.dtype)
    model.dtype = compute.dtype

    def watched(windows, **options):
        for window in windows:
            yield window
            sizes.append(resident_bytes())

    tokenizer = Tokenizer.train_from_iterator(["abc"], 265)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_eval, "tqdm", watched)
        result = evaluate_core(model, tokenizer, os.environ["BUNDLE"], compute=compute)
    return {"rows": sum(record["n"] for record in result["details"].values()), "bytes": sizes}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")
def test_memory_stays_flat_over_a_thousand_rows(tmp_path):
    """In bf16, for which a CPU keeps a kernel of each shape it has seen."""
    bundle = words_bundle(tmp_path, 550, longest=60)
    output = start("memory", BUNDLE=str(bundle), NANOCHAT_DTYPE="bfloat16").communicate(timeout=120)[0]
    result = json.loads(output.strip().splitlines()[-1])
    assert result["rows"] == 1100
    early, late = max(result["bytes"][2:5]), result["bytes"][-1]
    assert abs(late - early) < 0.05 * early, f"{early:,} to {late:,} bytes"


def ranks():
    """What each process of the test below runs, and the test itself alone."""
    compute, tokenizer = Compute.create("cpu"), Tokenizer.train_from_iterator(["abc"], 265)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_eval, "ROWS_AT_ONCE", 3)
        result = evaluate_core(tiny_model(265, 64), tokenizer, os.environ["BUNDLE"], compute=compute)
    rows = torch.arange(12 * 65).remainder(265).view(12, 65)[compute.rank :: compute.world_size]
    loss = evaluate_loss(tiny_model(265, 64), [(rows[:, :-1], rows[:, 1:])], tokenizer.token_bytes, compute)
    compute.close()
    return {"core": result, "bpb": round(loss.bits_per_byte, 4), "loss": round(loss.nats_per_token, 4)}


def test_any_number_of_ranks_agrees_with_one(tmp_path, monkeypatch):
    bundle = words_bundle(tmp_path, 16)  # in windows of three: the ranks' shares differ
    monkeypatch.setenv("BUNDLE", str(bundle))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [start("ranks", RANK=str(rank), **shared) for rank in range(2)]
    alone = json.loads(json.dumps(ranks()))
    outputs = [json.loads(process.communicate(timeout=120)[0].strip().splitlines()[-1]) for process in processes]
    assert outputs == [alone] * 2
    assert alone["core"]["details"]["words"]["n"] == 16
    assert set(alone["core"]["details"]["words"]["outcomes"]) == {"0", "1"}
