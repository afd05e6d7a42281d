"""Two records of base_eval or of chat_eval, task by task: is B better than A, or is it the luck of the questions?

    python -m dev.compare_evals evals/base_eval_base_d12.json evals/base_eval_hf_gpt2.json

Where both kept their answers to the same questions, these are paired: only questions on which the two differ tell them
apart, and the test is McNemar's, exact. Otherwise the two accuracies are taken for independent.

The error of a difference counts two answers more, shared evenly among what could be answered; without them it would be
0 where few questions were asked and all were answered alike (Agresti and Caffo 2000; Agresti and Min 2005). It is the
error of the questions drawn: two trainings that differ by nothing but the seed are further apart (σ of CORE .005 to
.006).
"""

import math
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

from nanochat import cli
from nanochat.common import read_json, write_record
from nanochat.table import to_table

Record = dict[str, Any]

LEVEL = 0.05  # two-sided


class Difference(NamedTuple):
    """B minus A with its standard error, and how often chance alone is that far from 0."""

    value: float
    stderr: float
    p: float
    paired: bool = False

    @property
    def verdict(self) -> str:
        if self.p >= LEVEL:
            return "not significant"
        return "B is better" if self.value > 0 else "A is better"


def two_sided(value: float, stderr: float) -> float:
    """Return the probability that a normal variable of this standard error is at least as far from 0."""
    return 2 * NormalDist().cdf(-abs(value) / stderr)


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p of McNemar's test: by chance, changed answers are gained or lost with equal odds."""
    n = gained + lost
    ways = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * ways / 2**n)


def compare_tasks(a: Record, b: Record) -> Difference:
    """Return the accuracy of record `b` less that of `a`."""
    if a.get("outcomes") and b.get("outcomes"):
        return compare_pairs(a["outcomes"], b["outcomes"])
    variance = 0.0
    for record in (a, b):
        n = record["n"] + 2
        p = (record["accuracy"] * record["n"] + 1) / n
        variance += p * (1 - p) / n
    value = b["accuracy"] - a["accuracy"]
    stderr = math.sqrt(variance)
    return Difference(value, stderr, two_sided(value, stderr))


def compare_pairs(a: str, b: str) -> Difference:
    """Return the difference of two models by their answers to the same questions, a digit each, 1 = right."""
    pairs = list(zip(a, b, strict=True))
    gained = pairs.count(("0", "1"))
    lost = pairs.count(("1", "0"))
    n = len(pairs) + 2
    gained_more = gained + 0.5
    lost_more = lost + 0.5
    variance = (gained_more + lost_more - (gained_more - lost_more) ** 2 / n) / n**2
    return Difference((gained - lost) / len(pairs), math.sqrt(variance), mcnemar(gained, lost), paired=True)


def read_tasks(path: Path) -> tuple[str, dict[str, Record]]:
    """Return the name of a record's mean, and its tasks. Raises ValueError when the file holds none."""
    record = read_json(path)
    try:
        name = "CORE" if record.get("core") else "ChatCORE"
        tasks = record["core"]["details"] if record.get("core") else record["tasks"]
        for label, task in tasks.items():
            outcomes = task.get("outcomes", "")
            whole = not outcomes or (len(outcomes) == task["n"] and set(outcomes) <= set("01"))
            if not (whole and task["n"] > 0 and 0 <= task["accuracy"] <= 1 and 0 <= task["baseline"] < 1):
                raise ValueError(f"{label} is damaged")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no record of base_eval or chat_eval with tasks ({error!r})") from error
    return name, tasks


def compare(path_a: Path, path_b: Path) -> Record:
    """Return a row per task, the mean centred difference over the tasks of both, and the tasks that one has alone.

    Raises ValueError when the records do not hold answers to the same questions.
    """
    name, a = read_tasks(path_a)
    other_name, b = read_tasks(path_b)
    if name != other_name:
        raise ValueError(f"{path_a} is a record of {name}, {path_b} of {other_name}: compare two of one kind")
    shared = [label for label in a if label in b]
    if not shared:
        raise ValueError(f"{path_a} and {path_b} have no task in common: evaluate both with the same tasks")
    rows = []
    values = []
    errors = []
    for label in shared:
        if any(a[label].get(key) != b[label].get(key) for key in ("fingerprint", "n", "baseline")):
            raise ValueError(
                f"{label}: {path_a} and {path_b} answer different questions: evaluate both with the same bundle "
                "and the same number of rows"
            )
        difference = compare_tasks(a[label], b[label])
        room = 1 - a[label]["baseline"]  # from guessing to all right
        values.append(difference.value / room)
        errors.append(difference.stderr / room)
        row = {
            "task": label,
            "n": a[label]["n"],
            "A": a[label]["accuracy"],
            "B": b[label]["accuracy"],
            "B - A": difference.value,
            "± error": difference.stderr,
            "p": difference.p,
            "paired": "yes" if difference.paired else "no",
            "verdict": difference.verdict,
        }
        rows.append(row)
    value = fmean(values)
    stderr = math.hypot(*errors) / len(errors)
    mean = Difference(value, stderr, two_sided(value, stderr))
    return {
        "mean_of": name,
        "tasks": rows,
        "difference": mean.value,
        "stderr": mean.stderr,
        "p": mean.p,
        "verdict": mean.verdict,
        "only_in": {"A": [label for label in a if label not in b], "B": [label for label in b if label not in a]},
    }


def main() -> None:
    parser = cli.Parser(prog="python -m dev.compare_evals", description=__doc__.splitlines()[0])
    parser.add_argument("a", type=Path, metavar="A.json", help="a record of base_eval or chat_eval")
    parser.add_argument("b", type=Path, metavar="B.json", help="another of the same kind")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the comparison as a record")
    args = parser.parse_args()
    result = compare(args.a, args.b)
    print(f"A = {args.a}\nB = {args.b}\n\n{to_table(result['tasks'])}\n")
    for side, labels in result["only_in"].items():
        if labels:
            print(f"only in {side}, not compared: {', '.join(labels)}")
    by_chance = LEVEL * len(result["tasks"])
    print(f"Of {len(result['tasks'])} tasks, about {by_chance:.1f} would look significant by chance alone.")
    difference = result["difference"]
    reach = NormalDist().inv_cdf(1 - LEVEL / 2) * result["stderr"]
    print(
        f"{result['mean_of']}, B - A: {difference:+.4f} ± {result['stderr']:.4f}, 95 % interval "
        f"{difference - reach:+.4f} to {difference + reach:+.4f}, p = {result['p']:.2g}: {result['verdict']} at 5 %"
    )
    if args.out:
        write_record(args.out, {"a": str(args.a), "b": str(args.b), **result})


if __name__ == "__main__":
    cli.run(main)
