"""Chat evaluation against direct scoring, one prompt at a time, and against answers that are known in advance."""

import itertools
import json
import math
import re
from fractions import Fraction

import pytest
import torch
from core_bundle import Fixed
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import run, run_ranks, script

from nanochat.chat_eval import CHATCORE, Sampling, chat_core, choose_letters, evaluate_task, pass_at_k
from nanochat.conversation import render_for_completion
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from scripts.chat_eval import Config
from tasks import builtin, public
from tasks.arithmetic import Arithmetic
from tasks.common import Task, single_turn
from tasks.world import WorldChoice, WorldFacts


@pytest.fixture(scope="module")
def tokenizer():
    facts = WorldFacts("test")
    return Tokenizer.train_from_iterator((facts[i]["messages"][0]["content"] for i in range(50)), 400)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = GPTConfig(
        sequence_len=256, vocab_size=tokenizer.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=1, n_embd=32
    )
    model = GPT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


class Recital:
    """An engine that knows what to say: the answer of each problem, from the end of the prompt."""

    def __init__(self, task, tokenizer, wrong=()):
        self.answers, self.calls = {}, []
        for i in range(len(task)):
            ids = render_for_completion(task[i], tokenizer)
            self.answers[tuple(ids)] = tokenizer.encode("no idea" if i in wrong else task[i]["messages"][-1]["content"])

    def run(self, requests):
        self.calls.append((len(requests), requests[0].max_tokens, requests[0].temperature))
        for request in requests:
            request.output = self.answers[tuple(request.tokens)]


class Letters(Task):
    """Ten questions of growing length whose right letter is always B, so that the score is the share of B."""

    name, eval_type, baseline = "letters", "categorical", 0.25

    def example(self, index):
        return single_turn("qzx " * 16 * (index + 1), "B", letters=list("ABCD"))

    def evaluate(self, conversation, completion):
        return completion == conversation["messages"][-1]["content"]


def likeliest_letter(model, tokenizer, conversation):
    ids = render_for_completion(conversation, tokenizer)
    ids = [ids[0], *ids[1:][-(model.config.sequence_len - 1) :]]
    with torch.no_grad():
        logits_V = model(torch.tensor([ids]))[0, -1]
    return max(conversation["letters"], key=lambda letter: logits_V[tokenizer.encode(letter)[0]])


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_categorical_batches_choose_as_one_prompt_at_a_time(model, tokenizer, batch_size):
    task = WorldChoice("test")
    n = 40
    expected = [task.evaluate(task[i], likeliest_letter(model, tokenizer, task[i])) for i in range(n)]
    record = evaluate_task(task, model, tokenizer, None, max_problems=n, batch_size=batch_size)
    assert record["accuracy"] == sum(expected) / n and record["n"] == n and record["baseline"] == 0.25
    assert [sample["correct"] for sample in record["samples"]] == expected[:3]
    assert 0 < sum(expected) < n


def test_only_the_letters_offered_are_compared(model, tokenizer):
    logits_TV = torch.zeros(9, tokenizer.get_vocab_size())
    logits_TV[:, tokenizer.get_bos_token_id()] = 9.0
    logits_TV[:, tokenizer.encode("C")[0]] = 5.0
    favours = Fixed(logits_TV)
    letters = [list("ABCD"), list("AB"), list("BA")]
    assert choose_letters(favours, tokenizer, [[1], [1, 2], [3]], letters) == ["C", "A", "B"]  # ties: the first
    with pytest.raises(ValueError, match="one token"):
        choose_letters(favours, tokenizer, [[1]], [["A", "\N{SNOWMAN}"]])


def test_generative_answers_are_decoded_and_judged(model, tokenizer):
    task = WorldFacts("test", size=30)
    engine = Recital(task, tokenizer, wrong={0, 7})
    record = evaluate_task(task, model, tokenizer, engine, batch_size=5, sampling=Sampling(max_new_tokens=50))
    p = 28 / 30
    assert record["accuracy"] == p and record["centered"] == p
    assert record["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 30))
    assert sum(n for n, _, _ in engine.calls) == 30
    assert all(call[1:] == (50, 0.0) for call in engine.calls)
    question, answer = (message["content"] for message in task[1]["messages"])
    assert record["samples"][0]["answer"] == "no idea" and not record["samples"][0]["correct"]
    assert record["samples"][1] == {"question": question, "answer": answer, "correct": True}


def test_the_real_engine_and_an_untrained_model_run_to_the_end(model, tokenizer):
    engine = Engine(model, tokenizer, max_batch=4)
    record = evaluate_task(
        Arithmetic("test"), model, tokenizer, engine, max_problems=6, batch_size=4, sampling=Sampling(8)
    )
    assert record["n"] == 6 and record["accuracy"] == 0 and len(record["samples"]) == 3


def test_prompts_beyond_the_context_lose_their_beginning_and_still_run(model, tokenizer):
    letters = Letters(10)
    longest = len(render_for_completion(letters[9], tokenizer))
    assert longest > model.config.sequence_len
    expected = sum(likeliest_letter(model, tokenizer, letters[i]) == "B" for i in range(10))
    assert evaluate_task(letters, model, tokenizer, None)["accuracy"] == expected / 10
    engine = Engine(model, tokenizer, max_batch=4)
    long_questions = Letters(10)
    long_questions.eval_type = "generative"
    assert evaluate_task(long_questions, model, tokenizer, engine, batch_size=10, sampling=Sampling(1000))["n"] == 10


def test_prompts_that_are_cut_are_named_and_counted(model, tokenizer, capsys):
    record = evaluate_task(Letters(10), model, tokenizer, None, batch_size=4)
    lengths = [len(render_for_completion(Letters(10)[i], tokenizer)) for i in range(10)]
    cut = [i for i, length in enumerate(lengths) if length > model.config.sequence_len]
    assert record["truncated"] == len(cut) > 0 and record["n"] == 10
    (line,) = capsys.readouterr().out.splitlines()
    assert f"letters: {len(cut)} of 10 prompts (the first is problem {cut[0]})" in line
    assert evaluate_task(Letters(1), model, tokenizer, None)["truncated"] == 0 and capsys.readouterr().out == ""


# --- samples and ranks -----------------------------------------------------------------------------------------------


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(case):
    n, correct, k = case
    answers = [True] * correct + [False] * (n - correct)
    draws = [any(draw) for draw in itertools.combinations(answers, k)]
    assert pass_at_k(n, correct, k) == pytest.approx(float(Fraction(sum(draws), len(draws))), abs=1e-12)


@given(st.integers(1, 5), st.integers(1, 5), st.fractions(0, 1, max_denominator=7))
def test_pass_at_k_is_unbiased(k, more, p):
    """Over all outcomes of n independent answers, its mean is the chance that one of k answers is right."""
    n = k + more
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = sum(float(weight) * pass_at_k(n, c, k) for c, weight in enumerate(weights))
    assert mean == pytest.approx(float(1 - (1 - p) ** k), abs=1e-12)


def test_pass_at_k_of_many_samples():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
    assert pass_at_k(200, 0, 100) == 0 and pass_at_k(200, 101, 100) == 1


class FewRight(Task):
    """Problem i is answered rightly by sample s where s < i; the model is asked for its request's number."""

    name = "few_right"

    def example(self, index):
        return single_turn(f"problem {index}", "yes", place=index)

    def evaluate(self, conversation, completion):
        problem, sample = divmod(int(completion), 4)
        assert problem == conversation["place"]
        return sample < problem


class Counting:
    """An engine that answers each request with its own number, so that the numbers can be checked."""

    def __init__(self, tokenizer):
        self.tokenizer, self.seen = tokenizer, []

    def run(self, requests):
        for request in requests:
            request.output = self.tokenizer.encode(str(request.sample))
            self.seen.append((request.seed, request.temperature, request.top_k))


def test_several_samples_give_pass_at_k_with_errors_over_problems(model, tokenizer):
    engine = Counting(tokenizer)
    sampling = Sampling(num_samples=4, pass_k=2, temperature=0.7, top_k=5, seed=9)
    record = evaluate_task(FewRight(5), model, tokenizer, engine, batch_size=2, sampling=sampling)
    rights = [0, 1, 2, 3, 4]
    ones = [c / 4 for c in rights]
    twos = [sum(any(d) for d in itertools.combinations([1] * c + [0] * (4 - c), 2)) / 6 for c in rights]
    for k, chances in (("1", ones), ("2", twos)):
        mean = sum(chances) / 5
        error = math.sqrt(sum((chance - mean) ** 2 for chance in chances) / 5 / 5)
        assert record["pass_at_k"][k] == {"accuracy": pytest.approx(mean), "stderr": pytest.approx(error)}
    assert record["accuracy"] == record["pass_at_k"]["1"]["accuracy"] and record["num_samples"] == 4
    assert record["stderr"] == record["pass_at_k"]["1"]["stderr"] and "outcomes" not in record
    assert engine.seen == [(9, 0.7, 5)] * 20
    assert record["samples"][1] == {"question": "problem 1", "answer": "4", "correct": True}


class Rank:
    """One of several ranks that run one after the other: the last to sum has the sum of all."""

    device = torch.device("cpu")

    def __init__(self, rank, world_size, sums):
        self.rank, self.world_size, self.sums = rank, world_size, sums

    def all_reduce_sum(self, tensor):
        self.sums.append(tensor)
        return sum(self.sums)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_the_problems_and_find_the_same(model, tokenizer, ranks):
    sampling = Sampling(max_new_tokens=6, temperature=1.0, num_samples=3)
    more = {"batch_size": 2, "sampling": sampling}
    for task in (WorldChoice("test", size=21), Babble(21)):
        alone = evaluate_task(task, model, tokenizer, Engine(model, tokenizer, max_batch=4), **more)
        sums: list[torch.Tensor] = []
        for rank in reversed(range(ranks)):
            compute, engine = Rank(rank, ranks, sums), Engine(model, tokenizer, max_batch=4)
            together = evaluate_task(task, model, tokenizer, engine, compute=compute, **more)
        assert together == alone and 0 < alone["accuracy"] < 1


class Babble(Task):
    """Right is an answer of an even number of letters: what an untrained model says is right or wrong by chance."""

    name = "babble"

    def example(self, index):
        return single_turn(f"Say {index}", "ab")

    def evaluate(self, conversation, completion):
        return len(completion) % 2 == 0


def test_outcomes_are_those_of_the_problems_in_order(model, tokenizer):
    task = WorldFacts("test", size=30)
    record = evaluate_task(task, model, tokenizer, Recital(task, tokenizer, wrong={0, 7}), batch_size=2)
    assert record["outcomes"] == "0" + "1" * 6 + "0" + "1" * 22
    other = evaluate_task(task, model, tokenizer, Recital(task, tokenizer))
    assert other["fingerprint"] == record["fingerprint"] and other["outcomes"] == "1" * 30
    assert evaluate_task(task, model, tokenizer, Recital(task, tokenizer), 29)["fingerprint"] != record["fingerprint"]


# --- ChatCORE and the script -----------------------------------------------------------------------------------------


def score(centered, stderr=0.1, baseline=0.0):
    return {"centered": centered, "stderr": stderr, "baseline": baseline}


def test_chat_core_is_the_mean_centred_accuracy():
    some = chat_core({"world": score(1.0, 0.03), "choice": score(-0.25, 0.03, 0.25)})
    assert some["chatcore"] == 0.375 and some["chatcore_tasks"] == ["world", "choice"]
    assert some["chatcore_stderr"] == pytest.approx(math.sqrt(0.03**2 + 0.04**2) / 2)
    six = {name: score(0.5) for name in CHATCORE}
    assert chat_core({**six, "world": score(1.0)}) == chat_core(six)
    assert chat_core(six)["chatcore"] == 0.5 and len(CHATCORE) == 6
    assert set(CHATCORE) <= {*builtin.SCORED, *public.SCORED}


def test_a_task_without_problems_is_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="no problems"):
        evaluate_task(Letters(0), model, tokenizer, None)


def test_the_script_knows_its_tasks_and_refuses_what_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert Config().task_names == list(builtin.SCORED)
    assert all(len(Config().task(name)) > 0 for name in builtin.SCORED)
    assert Config(tasks="choice,world,choice").task_names == ["choice", "world"]
    for wrong, named in (
        ({"tasks": "choice,chess"}, "chess"),
        ({"tasks": ""}, "--tasks"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"num_samples": 4}, "--temperature above 0"),
        ({"pass_k": 2}, "--num-samples 2 or more"),
        ({"num_samples": 0}, "--num-samples 0"),
        ({"top_k": 0}, "--top-k 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(named)):
            Config(**wrong)
    assert Config(tasks_dir=str(tmp_path)).task_names == list(builtin.SCORED)
    with pytest.raises(ValueError, match=r"--tasks-dir .*/none: no such folder"):
        Config(tasks_dir=str(tmp_path / "none")).task_names  # noqa: B018


@pytest.fixture
def some_tasks(tmp_path):
    """A folder of published tasks: one good, one of which half is bad, one empty, one with no file."""
    import pyarrow as pa
    from pyarrow import parquet

    choice = [{"question": f"Which is {i}?", "choices": [str(i), "none", "7"], "answer": 0} for i in range(9)]
    sums = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(4)] + [{"question": "x", "answer": "y"}]
    tables = {"mmlu": pa.Table.from_pylist(choice), "gsm8k": pa.Table.from_pylist(sums)}
    arc = {"question": "x", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "A"}
    for name, table in {**tables, "arc_easy": pa.Table.from_pylist([arc]).slice(0, 0)}.items():
        (tmp_path / "tasks" / name).mkdir(parents=True)
        parquet.write_table(table, tmp_path / "tasks" / name / "test.parquet")
    return str(tmp_path / "tasks")


def test_the_script_names_what_it_skips_and_ranks_agree(trained_world, some_tasks):
    flags = ["--stage", "mid", "--tasks-dir", some_tasks, "--max-problems", "6", "--max-new-tokens", "6"]
    flags += ["--num-samples", "3", "--pass-k", "2", "--temperature", "1", "--batch-size", "2"]
    out = run("scripts.chat_eval", *flags).out
    path = trained_world / "evals" / "chat_eval_mid_d2.json"
    alone = json.loads(path.read_text())
    assert alone["skipped"] == {"arc_easy": "arc_easy has no problems"} and "arc_easy skipped: arc_easy has" in out
    assert alone["tasks"]["gsm8k"]["skipped"] == 1 and "row 4: the answer has no number" in out
    assert alone["tasks"]["mmlu"]["n"] == 6 and len(alone["tasks"]["mmlu"]["outcomes"]) == 6
    assert set(alone["tasks"]) == {*builtin.SCORED, "mmlu", "gsm8k"} == set(alone["chatcore_tasks"])
    assert set(alone["tasks"]["world"]["pass_at_k"]) == {"1", "2"} and "pass@2" in out
    path.unlink()
    ranks = run_ranks(2, "scripts.chat_eval", *flags)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].err + ranks[1].err
    together = json.loads(path.read_text())
    assert {key: together[key] for key in ("tasks", "chatcore", "skipped")} == {
        key: alone[key] for key in ("tasks", "chatcore", "skipped")
    }
    line = script("scripts.chat_eval", "--stage", "mid", "--tasks-dir", some_tasks, "--tasks", "arc_easy,arc_challenge")
    assert "no task could run: arc_easy has no problems; " in line.error_line
    assert "arc_challenge/test.parquet is missing" in line.error_line
