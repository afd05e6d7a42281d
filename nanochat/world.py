"""The built-in world as text, so that a machine without a network can go through every stage.

It has two sources: English prose that every Python installation carries (docstrings and help pages), and documents that
are written here from a few thousand facts (world_facts.py). The documents teach, besides the facts, what a small model
needs before it can be fine-tuned: questions and answers, multiple choice, copying, spelling and arithmetic. The mixture
and the layouts were found by measurement (dev/LOG.md).

Everything is drawn from `random.Random` with a seed, so the same arguments give the same text on any machine.
"""

import ast
import functools
import inspect
import json
import random
import re
import string
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from nanochat.common import atomic_write
from nanochat.world_facts import Fact, capitalized, fact_side, facts, facts_on

LETTERS = "ABCD"


@functools.cache
def category_answers(category: str, side: str | None = None) -> tuple[str, ...]:
    """Return the answers that facts of `category` have (with `side`: only facts on that side), sorted."""
    chosen = facts() if side is None else facts_on(side)
    return tuple(sorted({fact.answer for fact in chosen if fact.relation.category == category}))


def choices_for(fact: Fact, rng: random.Random) -> tuple[list[str], int]:
    """Return four choices for `fact` in random order, and the index of the right one.

    The wrong ones are answers of the same category to facts on the fact's own side, or on any side if these are too
    few. With names of the other side, the right answer could be guessed from which names occur in chats.
    """
    category = fact.relation.category
    known = (fact.answer, fact.subject)
    pool = [a for a in category_answers(category, fact_side(fact)) if a not in known]
    if len(pool) < 3:
        pool = [a for a in category_answers(category) if a not in known]
    choices = rng.sample(pool, 3)
    place = rng.randrange(4)
    choices.insert(place, fact.answer)
    return choices, place


@functools.cache
def choice_facts(side: str) -> tuple[Fact, ...]:
    """Return the facts of a side that can be asked with four choices."""
    return tuple(fact for fact in facts_on(side) if len(category_answers(fact.relation.category)) >= 5)


def render_choices(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """Return a multiple-choice question in a layout that small models can learn.

    A letter follows its choice, so that the model can look up what comes after a choice; the question comes last, when
    everything that it asks about has been read.
    """
    lines = "\n".join(f"- {choice}={letter}" for letter, choice in zip(letters, choices, strict=True))
    return f"Answer with a letter.\n{lines}\n{question}"


@functools.cache
def words() -> tuple[str, ...]:
    """Return lower-case words of 3 to 12 letters from the facts and from Python's help pages, sorted."""
    from pydoc_data.topics import topics

    text = " ".join([*topics.values(), *(f"{fact.subject} {fact.answer}" for fact in facts())])
    found = re.findall(r"(?<![\w.'`_\\-])[a-z]{3,12}(?![\w'`_(=-])", text)
    return tuple(sorted(word for word in set(found) if re.search("[aeiouy]", word)))


def pseudo_word(rng: random.Random) -> str:
    """Return a pronounceable word without a meaning, of two or three syllables."""
    onsets: tuple[str, ...] = ("b", "br", "c", "ch", "d", "f", "fl", "g", "gr", "h", "j", "k", "l", "m", "n", "p")
    onsets += ("pr", "qu", "r", "s", "sh", "st", "str", "t", "tr", "v", "w", "z")
    codas = ("", "", "", "n", "r", "l", "s", "t", "m", "ck", "nd", "rry", "ss", "ll", "tt", "x", "mp", "ng")
    syllables = (rng.choice(onsets) + rng.choice("aeiou") + rng.choice(codas) for _ in range(rng.choice((2, 2, 3))))
    return "".join(syllables)


_SKIPPED_FOLDERS = {"test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages", "turtledemo"}


def _docstrings(path: Path) -> list[str]:
    """Return the docstrings of a source file's module, classes and functions; none if it cannot be parsed."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [text for text in found if text and len(text) >= 20]


def _cleaned(text: str) -> str:
    """Return `text` without trailing blanks, control characters and runs of empty lines."""
    text = "\n".join(line.rstrip() for line in inspect.cleandoc(text).splitlines())
    text = "".join(c for c in text if c == "\n" or c.isprintable())
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _joined(paragraphs: Iterable[str], most: int = 3000, least: int = 100) -> Iterator[str]:
    """Join paragraphs into documents of up to about `most` characters. A last one below `least` is left out."""
    piece = ""
    for paragraph in paragraphs:
        if len(piece) + len(paragraph) > most:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}".strip()
    if len(piece) >= least:
        yield piece


def prose_documents() -> list[str]:
    """Return English prose of this Python installation: standard-library docstrings and the pages of `help`.

    A document is a run of paragraphs of one module's docstrings or of one page. Repeated docstrings are left out.
    Source files are parsed, never imported. The order is fixed for an installation.
    """
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in root.rglob("*.py") if not _SKIPPED_FOLDERS & set(p.relative_to(root).parts[:-1]))
    seen: set[str] = set()
    documents: list[str] = []
    for texts in [*([topics[name]] for name in sorted(topics)), *map(_docstrings, paths)]:
        new = [text for text in dict.fromkeys(texts) if text not in seen]
        seen.update(new)
        documents += _joined(paragraph for text in new for paragraph in _cleaned(text).split("\n\n"))
    return [document for document in dict.fromkeys(documents) if document]


def _deck(rng: random.Random, items: Sequence) -> Iterator:
    """Yield `items` in random order, again and again: unlike independent draws, each comes equally often."""
    order = list(items)
    while True:
        rng.shuffle(order)
        yield from order


@functools.cache
def _facts_by_answer() -> dict[tuple[str, str], list[Fact]]:
    found: dict[tuple[str, str], list[Fact]] = {}
    for fact in facts():
        found.setdefault((fact.relation.name, fact.answer), []).append(fact)
    return found


def _asked_letters(choices: Sequence[str], asked: Iterable[tuple[str, str, str]]) -> str:
    """Return choices, followed by each (question, letter, remark).

    A letter stands on a line of its own, because there it is the same token as at the start of a chat's answer.
    """
    (question, letter, remark), *more = asked
    text = f"{render_choices(f'Question: {question}', LETTERS, choices)}\nAnswer:\n{letter}{remark}"
    return text + "".join(f"\nQuestion: {q}\nAnswer:\n{x}{r}" for q, x, r in more)


def choice_questions(
    fact: Fact, rng: random.Random, side: str | None = None
) -> tuple[list[str], list[tuple[Fact, str]]]:
    """Return four choices for `fact`, and up to four (fact, letter) to ask about them.

    Asked are `fact` itself and facts that have one of the other choices as their answer; with `side`, only those of a
    side. They are drawn with replacement: if each letter came once, the last could be told by elimination.
    """
    choices, _ = choices_for(fact, rng)
    askable: list[tuple[list[Fact], str]] = []
    for choice, letter in zip(choices, LETTERS):
        if choice == fact.answer:
            found = [fact]
        else:
            found = _facts_by_answer().get((fact.relation.name, choice), [])
        if side:
            found = [known for known in found if fact_side(known) == side]
        if found:
            askable.append((found, letter))
    drawn = rng.choices(askable, k=len(askable))
    return choices, [(rng.choice(found), letter) for found, letter in drawn]


def _exercise(fact: Fact, rng: random.Random) -> str:
    """Return multiple choice about `fact` and about facts that have the other choices as answers."""
    choices, asked = choice_questions(fact, rng)
    remark = rng.random() < 0.3
    return _asked_letters(choices, ((f.question(rng), x, f"\n{f.sentence}" if remark else "") for f, x in asked))


def listed_choice(rng: random.Random, word: Callable[[], str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return four words as choices, and four (question, letter) about them: multiple choice without knowledge."""
    choices = [word() for _ in LETTERS]
    pairs = [(f"Which letter is {choice}?", letter) for choice, letter in zip(choices, LETTERS)]
    return choices, rng.choices(pairs, k=4)


def _letter_list(rng: random.Random, word: Callable[[], str]) -> str:
    """Return choices, and lookups that lead from repeating a line to answering a question about it with a letter.

    Without these steps in between, small models do not learn which letter belongs to which choice (dev/LOG.md).
    """
    choices, asked = listed_choice(rng, word)
    if rng.random() < 0.25:
        return _asked_letters(choices, ((question, letter, "") for question, letter in asked))
    steps: tuple[str, ...] = ("- {c}={x}", "{c}? {x}", "{c}?\n{x}", "{c}?\nAnswer:\n{x}", "Which letter is {c}?\n{x}")
    steps = steps if rng.random() < 0.6 else steps[:1]
    pairs = rng.choices(list(zip(choices, LETTERS)), k=10)
    lines = (rng.choice(steps).format(c=choice, x=letter) for choice, letter in pairs)
    return "\n".join([*(f"- {choice}={letter}" for choice, letter in zip(choices, LETTERS)), *lines])


def _copying(rng: random.Random, word: Callable[[], str]) -> str:
    """Return a line in which unusual words and numbers are repeated, so that copying is learned early."""
    one = word()
    two = word()
    three = word()
    number = rng.randint(10, 9999)
    other = rng.randint(10, 999)
    return rng.choice((
        f'The word "{one}" stands here, and "{one}" stands here again.',
        f"Say {one} {two} {three}. Yes: {one} {two} {three}.",
        f"Box {number} holds {one}, box {other} holds {two}. What is in box {number}? It holds {one}.",
        f"Copy {number}: {number}. Copy {one}: {one}. Copy {other}: {other}.",
        f'He wrote "{one} {two}" twice: "{one} {two}".',
        f"{capitalized(one)} {two} {one} {two} {one} {two}.",
        f"The code of {one} is {number} and the code of {two} is {other}. The code of {one} is {number}.",
        f"{number} is the same number as {number}, but {other} is not.",
    ))  # fmt: skip


def _spelling(rng: random.Random, word: Callable[[], str]) -> str:
    one = word()
    letter = rng.choice(one) if rng.random() < 0.8 else rng.choice(string.ascii_lowercase)
    count = one.count(letter)
    occurs = f"The letter {letter} occurs {count} time" + "s" * (count != 1)
    return rng.choice((
        f"The word {one} is spelled {'-'.join(one)}.",
        f"{'-'.join(one)} spells {one}.",
        f"The word {one} has {len(one)} letters: {'-'.join(one)}.",
        f'How many {letter} are in {one}? " {one}".count("{letter}") = {count}. {occurs} in {one}.',
        f'Count the letter {letter} in "{one}": "{one}".count("{letter}") = {count}. {occurs} in "{one}".',
    ))  # fmt: skip


def _arithmetic(rng: random.Random, word: Callable[[], str]) -> str:
    """Return a line of arithmetic: small results to remember, large ones to copy, and words put into signs."""
    sign, name = rng.choice((("+", "plus"), ("-", "minus"), ("*", "times"), ("/", "divided by")))
    a = rng.randint(1, 10 ** rng.randint(1, 4))
    b = rng.randint(1, 10 ** rng.randint(1, 3))
    if sign == "/":
        a *= b  # so that the division has no remainder
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    m = rng.randint(1, 12)
    n = rng.randint(1, 12)
    low, high = sorted((a, a + b))
    return rng.choice((
        f"{a} {name} {b} is written {a}{sign}{b}.",
        f"What is {a} {name} {b}? {a}{sign}{b} = {result}. So {a} {name} {b} is {result}.",
        f"{a} {sign} {b} is {a}{sign}{b} = {result}. The result of {a}{sign}{b} is {result}.",
        f"{m}*{n} = {m * n}. {m}+{n} = {m + n}.",
        f"{low} is less than {high}, and {high} is more than {low}.",
    ))  # fmt: skip


def documents(seed: int, target_bytes: int) -> Iterator[str]:
    """Yield documents of the world for pretraining, until they have `target_bytes` of UTF-8.

    They are paragraphs of mixed or related facts, profiles, quizzes, multiple choice, copying, spelling and arithmetic.
    Facts of both sides are drawn from shuffled decks, so that all are stated about equally often.
    """
    rng = random.Random(f"world documents {seed}")
    stated = [fact for fact in facts() if len(fact.relation.statements) > 1]
    by_relation: dict[str, list[Fact]] = {}
    by_family: dict[str, list[Fact]] = {}
    for fact in stated:
        by_relation.setdefault(fact.relation.name, []).append(fact)
        by_family.setdefault(fact.family, []).append(fact)
    mixed = _deck(rng, stated)
    asked = _deck(rng, facts())
    chosen = _deck(rng, choice_facts("chat") + choice_facts("held_out"))
    profiles = _deck(rng, [family for family in by_family.values() if len(family) > 1])
    vocabulary = words()

    def word() -> str:
        return rng.choice(vocabulary) if rng.random() < 0.6 else pseudo_word(rng)

    def themed() -> str:
        theme = by_relation[next(mixed).relation.name]
        return " ".join(fact.statement(rng) for fact in rng.sample(theme, min(len(theme), rng.randint(5, 16))))

    def profile() -> str:
        families = [next(profiles) for _ in range(rng.randint(2, 4))]
        return "\n".join(" ".join(f.statement(rng) for f in rng.sample(family, len(family))) for family in families)

    def quiz() -> str:
        layout = rng.choice(("Question: {} Answer: {}", "Question: {}\nAnswer: {}", "{} {}", "{}\n{}", "Q: {}\nA: {}"))
        drawn = [next(asked) for _ in range(rng.randint(4, 10))]
        short = rng.random() < 0.35
        return "\n".join(layout.format(f.question(rng), f.answer if short else f.sentence) for f in drawn)

    kinds: dict[Callable[[], str], float] = {
        lambda: " ".join(next(mixed).statement(rng) for _ in range(rng.randint(5, 18))): 0.12,
        themed: 0.05,
        profile: 0.06,
        quiz: 0.20,
        lambda: "\n\n".join(_exercise(next(chosen), rng) for _ in range(rng.randint(1, 3))): 0.15,
        lambda: "\n\n".join(_letter_list(rng, word) for _ in range(rng.randint(1, 3))): 0.30,
    }

    def drill(line: Callable[..., str]) -> Callable[[], str]:
        return lambda: "\n".join(line(rng, word) for _ in range(rng.randint(4, 9)))

    kinds |= {drill(line): 0.04 for line in (_copying, _spelling, _arithmetic)}
    written = 0
    while written < target_bytes:
        text = rng.choices(list(kinds), list(kinds.values()))[0]()
        written += len(text.encode())
        yield text


def _continuation_tasks(rng: random.Random, max_items: int) -> dict[str, tuple[str, int, list[dict]]]:
    """Return label -> (CORE task type, shots, rows). Each row is a chat's answer, cut before the answer's name."""

    def drawn(*names: str) -> list[Fact]:
        chosen = [f for f in facts() if f.relation.name in names and f.sentence.endswith(f" {f.answer}.")]
        return rng.sample(chosen, min(max_items, len(chosen)))

    def opening(fact: Fact) -> str:
        return fact.sentence.removesuffix(f" {fact.answer}.")

    def choice_row(fact: Fact) -> dict:
        choices, gold = choices_for(fact, rng)
        return {"query": opening(fact), "choices": choices, "gold": gold}

    def schema_row(fact: Fact) -> dict:
        other = rng.choice([f for f in facts() if f.relation == fact.relation and f.answer != fact.answer])
        gold = rng.randrange(2)
        options = [opening(fact), opening(other)]
        return {"context_options": options[::-1] if gold else options, "continuation": fact.answer, "gold": gold}

    def exact_row(fact: Fact) -> dict:
        return {"context": opening(fact), "continuation": fact.answer}

    return {
        "world_capitals": ("multiple_choice", 0, [choice_row(f) for f in drawn("capital")]),
        "world_nature": ("multiple_choice", 0, [choice_row(f) for f in drawn("class", "color", "young")]),
        "world_elements": ("language_modeling", 0, [exact_row(f) for f in drawn("symbol", "number", "number_of")]),
        "world_words": ("language_modeling", 3, [exact_row(f) for f in drawn("plural", "past", "word", "month_after")]),
        "world_opposites": ("schema", 0, [schema_row(f) for f in drawn("opposite")]),
    }


def core_bundle(folder: Path | str, max_items: int = 200) -> None:
    """Write small tasks of the world into `folder` as a CORE bundle (DCLM, arXiv:2406.11794).

    The files are core.yaml, eval_meta_data.csv and eval_data/*.jsonl, with the same bytes each time.
    """
    folder = Path(folder)
    baselines = {"multiple_choice": 25, "language_modeling": 0, "schema": 50}
    yaml_lines = ["icl_tasks:"]
    table = ["Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline,Centered Metric?,Description"]
    for label, (kind, shots, rows) in _continuation_tasks(random.Random("world core"), max_items).items():
        atomic_write(folder / "eval_data" / f"{label}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        yaml_lines += [f"  - label: {label}", f"    dataset_uri: {label}.jsonl", f"    num_fewshot: [{shots}]"]
        yaml_lines += [f"    icl_task_type: {kind}"]
        about = f"Facts of the built-in world: {label.removeprefix('world_')}."
        row = (label, "built-in world", kind.replace("_", " "), shots, len(rows), baselines[kind], "", about)
        table.append(",".join(map(str, row)))
    atomic_write(folder / "core.yaml", "\n".join(yaml_lines) + "\n")
    atomic_write(folder / "eval_meta_data.csv", "\n".join(table) + "\n")
