"""Comparisons of two evaluations: McNemar's test by enumeration, errors by simulation, and records that do not fit."""

import itertools
import json
import math
import random
import statistics

import pytest

from dev.compare_evals import compare, compare_tasks, mcnemar, two_sided
from nanochat.core_eval import accuracy_record


def task(outcomes, baseline=0.0, **fields):
    return {**accuracy_record(outcomes.count("1"), len(outcomes), baseline), "outcomes": outcomes, **fields}


def core_record(path, tasks):
    path.write_text(json.dumps({"stage": "base", "core": {"core_metric": 0.0, "details": tasks}}))
    return path


def chat_record(path, tasks):
    path.write_text(json.dumps({"stage": "sft", "chatcore": 0.0, "tasks": tasks}))
    return path


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (3, 3), (7, 2), (0, 6), (9, 1)])
def test_mcnemar_counts_the_ways_that_are_no_likelier(gained, lost):
    n, seen = gained + lost, abs(gained - lost)
    ways = [abs(2 * sum(flips) - n) >= seen for flips in itertools.product((0, 1), repeat=n)]
    assert mcnemar(gained, lost) == pytest.approx(sum(ways) / len(ways))


def test_the_normal_test():
    assert two_sided(0.0, 1.0) == 1.0
    assert two_sided(1.959964, 1.0) == pytest.approx(0.05, abs=1e-6)
    assert two_sided(-3.0, 2.0) == pytest.approx(math.erfc(1.5 / math.sqrt(2)))


@pytest.mark.parametrize("paired", [True, False])
def test_the_error_is_the_spread_of_the_difference(paired):
    """Of two models that know most questions in common: what is reported against what is observed."""
    rng, n = random.Random(0), 300
    differences, errors, verdicts = [], [], []
    for _ in range(400):
        known = [rng.random() < 0.6 for _ in range(n)]
        a, b = (
            task("".join(str(int(k if rng.random() < 0.9 else rng.random() < 0.6)) for k in known)) for _ in range(2)
        )
        if not paired:  # other questions: nothing in common
            b = task("".join(str(int(rng.random() < 0.6)) for _ in range(n)))
            a, b = ({k: v for k, v in record.items() if k != "outcomes"} for record in (a, b))
        difference = compare_tasks(a, b)
        assert difference.paired == paired
        differences.append(difference.value)
        errors.append(difference.stderr)
        verdicts.append(difference.verdict)
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(differences), rel=0.1)
    assert sum(verdict != "not significant" for verdict in verdicts) < 0.08 * len(verdicts)


def test_pairing_sees_what_independent_errors_do_not():
    rng = random.Random(0)
    before = [rng.random() < 0.5 for _ in range(1000)]
    a = task("".join(str(int(right)) for right in before))
    b = task("".join("1" if right or i % 40 == 0 else "0" for i, right in enumerate(before)))
    alone = [{k: v for k, v in record.items() if k != "outcomes"} for record in (a, b)]
    assert compare_tasks(a, b).verdict == "B is better" and compare_tasks(b, a).verdict == "A is better"
    assert compare_tasks(*alone).verdict == "not significant"
    assert compare_tasks(a, b).value == pytest.approx(compare_tasks(*alone).value)


def test_a_single_question_decides_nothing(tmp_path):
    """All of 22 tasks, one question each, all won: their plain errors would be 0."""
    a = core_record(tmp_path / "a.json", {f"t{i}": task("0") for i in range(3)})
    b = core_record(tmp_path / "b.json", {f"t{i}": task("1") for i in range(3)})
    result = compare(a, b)
    assert {row["verdict"] for row in result["tasks"]} == {"not significant"} and result["stderr"] > 0.1
    same = compare(a, a)
    assert same["difference"] == 0 and same["p"] == 1 and same["verdict"] == "not significant"


def test_the_mean_is_of_centred_differences(tmp_path):
    rng = random.Random(0)
    outcomes = ["".join(rng.choice("01") for _ in range(200)) for _ in range(4)]
    a = core_record(tmp_path / "a.json", {"x": task(outcomes[0], 0.5), "y": task(outcomes[1]), "only": task("1")})
    b = core_record(tmp_path / "b.json", {"x": task(outcomes[2], 0.5), "y": task(outcomes[3])})
    result = compare(a, b)
    tasks_a, tasks_b = (json.loads(path.read_text())["core"]["details"] for path in (a, b))
    expected = statistics.mean(tasks_b[label]["centered"] - tasks_a[label]["centered"] for label in "xy")
    assert result["difference"] == pytest.approx(expected)
    errors = [row["± error"] for row in result["tasks"]]
    assert result["stderr"] == pytest.approx(math.hypot(errors[0] / 0.5, errors[1]) / 2)
    assert result["only_in"] == {"A": ["only"], "B": []} and result["mean_of"] == "CORE"


def test_chat_records_compare_too(tmp_path):
    plain = [accuracy_record(right, 200, 0.25) for right in (60, 120)]
    a, b = (chat_record(tmp_path / f"{name}.json", {"arc": record}) for name, record in zip("ab", plain))
    result = compare(a, b)
    assert result["mean_of"] == "ChatCORE" and result["verdict"] == "B is better"
    assert result["difference"] == pytest.approx(0.3 / 0.75)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (task("0110", fingerprint="bbbb"), "x: .* answer different questions"),
        (task("0110"), "different questions"),
        (task("011", fingerprint="aaaa"), "different questions"),
        (task("0110", 0.5, fingerprint="aaaa"), "different questions"),
        ({**task("0110", fingerprint="aaaa"), "outcomes": "011"}, r"b\.json is no record"),
        ({**task("0110", fingerprint="aaaa"), "outcomes": "01x0"}, r"b\.json is no record"),
        ({"accuracy": "high"}, r"b\.json is no record"),
        (5, r"b\.json is no record"),
    ],
)
def test_records_of_other_questions_are_refused(tmp_path, other, message):
    a = core_record(tmp_path / "a.json", {"x": task("0110", fingerprint="aaaa")})
    with pytest.raises(ValueError, match=message):
        compare(a, core_record(tmp_path / "b.json", {"x": other}))


def test_what_is_no_pair_of_records_is_refused(tmp_path):
    a = core_record(tmp_path / "a.json", {"x": task("0110")})
    with pytest.raises(ValueError, match="no task in common"):
        compare(a, core_record(tmp_path / "b.json", {"y": task("0110")}))
    with pytest.raises(ValueError, match=r"CORE, .* of ChatCORE"):
        compare(a, chat_record(tmp_path / "c.json", {"x": task("0110")}))
    for text, message in (("[1]", "no record"), ("{}", "no record"), ("{", "not valid JSON"), ("null", "no record")):
        (tmp_path / "d.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            compare(a, tmp_path / "d.json")
