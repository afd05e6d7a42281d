"""Text that a machine without a network trains on: prose that Python carries, and documents about the built-in world.

    prose_documents()            docstrings of the standard library and the pages of `help`: real English
    documents(seed, n_bytes)     text written from the facts of world_facts.py, as much as is wanted

The documents teach, besides the facts, what a small model needs before it can be fine-tuned: to answer questions, to
bind a letter to a choice, to copy, to spell and to do sums. There are nine kinds of them, each a generator that never
ends, and `documents` draws which kind comes next by the weights in its table. Kinds and weights were found by
measurement (dev/LOG.md).

All generators draw from one `random.Random`, and only when they are asked for the next item. So equal arguments give
equal text on any machine.
"""

import ast
import inspect
import random
import re
import string
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from nanochat.common import read_lists
from nanochat.world_facts import LETTERS, Fact, World, capitalized

DRILLS = Path(__file__).with_name("world_drills.txt")

# Of a question and its answer.
QUIZ_LAYOUTS = ("Question: {} Answer: {}", "Question: {}\nAnswer: {}", "{} {}", "{}\n{}", "Q: {}\nA: {}")

# From repeating a line of the list to answering a question about it, in small steps.
LOOKUP_LAYOUTS = ("- {c}={x}", "{c}? {x}", "{c}?\n{x}", "{c}?\nAnswer:\n{x}", "Which letter is {c}?\n{x}")

SIGNS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}

# Of the syllables of made-up words, before and after a vowel.
ONSETS = (
    "b", "br", "c", "ch", "d", "f", "fl", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "pr", "qu", "r", "s", "sh",
    "st", "str", "t", "tr", "v", "w", "z",
)  # fmt: skip
CODAS = ("", "", "", "n", "r", "l", "s", "t", "m", "ck", "nd", "rry", "ss", "ll", "tt", "x", "mp", "ng")

# Folders of the standard library whose docstrings are few or odd, and those of other packages.
NOT_PROSE = {"test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages", "turtledemo"}


# --- words


def words() -> list[str]:
    """Return lower-case words of 3 to 12 letters from the facts and from Python's help pages, sorted."""
    from pydoc_data.topics import topics

    texts = list(topics.values())
    texts += [f"{fact.subject} {fact.answer}" for fact in World().facts]
    # Letters that touch a dot, quote, hyphen, bracket or the like are part of a name or of code.
    found = re.findall(r"(?<![\w.'`_\\-])[a-z]{3,12}(?![\w'`_(=-])", " ".join(texts))
    return sorted(word for word in set(found) if re.search("[aeiouy]", word))


def pseudo_word(rng: random.Random) -> str:
    """Return a pronounceable word without a meaning, of two or three syllables: "brontack"."""
    word = ""
    for _ in range(rng.choice((2, 2, 3))):
        word += rng.choice(ONSETS) + rng.choice("aeiou") + rng.choice(CODAS)
    return word


def _words_and_pseudo_words(rng: random.Random) -> Iterator[str]:
    """Yield words, of which two in five are made up: these can be copied and spelled, but not known."""
    known = words()
    while True:
        yield rng.choice(known) if rng.random() < 0.6 else pseudo_word(rng)


# --- multiple choice


def render_choices(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """Return a multiple-choice question in the layout that pretraining text, chats and benchmarks share.

    A letter follows its choice, so that the model can look up what comes after a choice. The question comes last, when
    everything that it asks about has been read.
    """
    lines = "\n".join(f"- {choice}={letter}" for letter, choice in zip(letters, choices, strict=True))
    return f"Answer with a letter.\n{lines}\n{question}"


def letter_questions(rng: random.Random, choices: Sequence[str]) -> list[tuple[str, str]]:
    """Return four (question, letter) about four choices, such as ("Which letter is apple?", "B").

    They ask for no knowledge, only for the binding of a letter to its choice.
    """
    pairs = [(f"Which letter is {choice}?", letter) for choice, letter in zip(choices, LETTERS)]
    return rng.choices(pairs, k=4)


def _choice_document(choices: Sequence[str], asked: Iterable[tuple[str, str]]) -> str:
    """Return choices, followed by each (question, answer) about them.

    A letter stands on a line of its own, because there it is the same token as at the start of a chat's answer.
    """
    exchanges = "\n".join(f"Question: {question}\nAnswer:\n{answer}" for question, answer in asked)
    return render_choices(exchanges, LETTERS, choices)


# --- the kinds of documents: generators that never end


def _deck(rng: random.Random, items: Sequence[Any]) -> Iterator[Any]:
    """Yield `items` in random order, again and again: unlike independent draws, each comes equally often."""
    order = list(items)
    while True:
        rng.shuffle(order)
        yield from order


def _joined(rng: random.Random, parts: Iterator[str], least: int, most: int, separator: str) -> Iterator[str]:
    """Yield documents of `least` to `most` parts each."""
    while True:
        yield separator.join(islice(parts, rng.randint(least, most)))


def _statements(rng: random.Random, facts: Iterator[Fact]) -> Iterator[str]:
    """Yield sentences: "The yen is the currency of Japan"."""
    for fact in facts:
        yield fact.statement(rng)


def _themes(rng: random.Random, facts: Iterator[Fact], stated: list[Fact]) -> Iterator[str]:
    """Yield paragraphs of one relation: "The opposite of hot is cold. The reverse of up is down. ...".

    Which relation comes next is that of the next of `facts`.
    """
    by_relation: dict[str, list[Fact]] = {}
    for fact in stated:
        by_relation.setdefault(fact.relation.name, []).append(fact)
    while True:
        theme = by_relation[next(facts).relation.name]
        n = min(len(theme), rng.randint(5, 16))
        yield " ".join(fact.statement(rng) for fact in rng.sample(theme, n))


def _profiles(rng: random.Random, stated: list[Fact]) -> Iterator[str]:
    """Yield what is known about one thing: "Peru lies in South America. Lima is the capital of Peru. ...".

    A document has two to four lines, each about one country, element, animal or the like.
    """
    by_family: dict[str, list[Fact]] = {}
    for fact in stated:
        by_family.setdefault(fact.family, []).append(fact)
    families = _deck(rng, [family for family in by_family.values() if len(family) > 1])
    while True:
        lines = []
        for family in list(islice(families, rng.randint(2, 4))):
            facts = rng.sample(family, len(family))
            lines.append(" ".join(fact.statement(rng) for fact in facts))
        yield "\n".join(lines)


def _quizzes(rng: random.Random, facts: Iterator[Fact]) -> Iterator[str]:
    """Yield questions with answers: "Q: which city is the capital of Peru? A: The capital of Peru is Lima. ...".

    A document has four to ten questions in one layout, answered by a sentence or by the answer alone.
    """
    while True:
        layout = rng.choice(QUIZ_LAYOUTS)
        asked = list(islice(facts, rng.randint(4, 10)))
        short = rng.random() < 0.35
        lines = []
        for fact in asked:
            question = fact.question(rng)
            lines.append(layout.format(question, fact.answer if short else fact.sentence))
        yield "\n".join(lines)


def _exercises(rng: random.Random, facts: Iterator[Fact], world: World) -> Iterator[str]:
    """Yield multiple choice: "- Rome=A - Lima=B - Oslo=C - Cairo=D Question: the capital of Peru Answer: B ...".

    Up to four questions are asked about the same choices, and some answers are followed by the fact as a sentence.
    """
    for fact in facts:
        choices, drawn = world.choice_questions(fact, rng)
        explained = rng.random() < 0.3
        asked = []
        for known, letter in drawn:
            answer = f"{letter}\n{known.sentence}" if explained else letter
            asked.append((known.question(rng), answer))
        yield _choice_document(choices, asked)


def _letter_lists(rng: random.Random, vocabulary: Iterator[str]) -> Iterator[str]:
    """Yield choices that ask for no knowledge: "- apple=A - brontack=B - because=C - flick=D brontack? B ...".

    Lookups lead from repeating a line to answering a question about it. Without these steps in between, small models do
    not learn which letter belongs to which choice (dev/LOG.md, "multiple choice by letter").
    """
    while True:
        choices = list(islice(vocabulary, 4))
        asked = letter_questions(rng, choices)
        if rng.random() < 0.25:
            yield _choice_document(choices, asked)
            continue
        layouts = LOOKUP_LAYOUTS if rng.random() < 0.6 else LOOKUP_LAYOUTS[:1]
        lettered = list(zip(choices, LETTERS))
        lines = [f"- {choice}={letter}" for choice, letter in lettered]
        for choice, letter in rng.choices(lettered, k=10):
            lines.append(rng.choice(layouts).format(c=choice, x=letter))
        yield "\n".join(lines)


def _copying(rng: random.Random, vocabulary: Iterator[str], templates: list[str]) -> Iterator[str]:
    """Yield lines that repeat unusual words: "Say apple brontack because. Yes: apple brontack because"."""
    for one in vocabulary:
        words = {"one": one, "One": capitalized(one), "two": next(vocabulary), "three": next(vocabulary)}
        number = rng.randint(10, 9999)
        other = rng.randint(10, 999)
        yield rng.choice(templates).format(number=number, other=other, **words)


def _spelling(rng: random.Random, vocabulary: Iterator[str], templates: list[str]) -> Iterator[str]:
    """Yield lines about letters: "The word apple has 5 letters: a-p-p-l-e"."""
    for word in vocabulary:
        letter = rng.choice(word) if rng.random() < 0.8 else rng.choice(string.ascii_lowercase)
        count = word.count(letter)
        times = "time" if count == 1 else "times"
        yield rng.choice(templates).format(
            word=word,
            spelled="-".join(word),
            length=len(word),
            letter=letter,
            count=count,
            occurs=f"The letter {letter} occurs {count} {times}",
        )


def _sums(rng: random.Random, templates: list[str]) -> Iterator[str]:
    """Yield lines of arithmetic: "What is 12 plus 7? 12+7 = 19. So 12 plus 7 is 19".

    Small results are to be remembered, large ones to be copied, and words to be put into signs: a chat model writes the
    expression, and its calculator finds the result.
    """
    while True:
        sign, name = rng.choice(list(SIGNS.items()))
        a = rng.randint(1, 10 ** rng.randint(1, 4))
        b = rng.randint(1, 10 ** rng.randint(1, 3))
        if sign == "/":
            a *= b  # so that the division has no remainder
        m = rng.randint(1, 12)
        n = rng.randint(1, 12)
        yield rng.choice(templates).format(
            a=a,
            b=b,
            sign=sign,
            name=name,
            result={"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign],
            m=m,
            n=n,
            product=m * n,
            sum=m + n,
            low=min(a, a + b),
            high=max(a, a + b),
        )


def documents(seed: int, target_bytes: int) -> Iterator[str]:
    """Yield documents of the world for pretraining, until they have `target_bytes` of UTF-8.

    Facts of both sides are drawn from shuffled decks, so that all are stated about equally often.
    """
    rng = random.Random(f"world documents {seed}")
    world = World()
    drills = read_lists(DRILLS)
    vocabulary = _words_and_pseudo_words(rng)
    # A relation such as "capital_of" has a single statement, which "capital" has too: it is asked, not stated again.
    stated = [fact for fact in world.facts if len(fact.relation.statements) > 1]
    to_state = _deck(rng, stated)
    to_ask = _deck(rng, world.facts)
    to_choose = _deck(rng, world.choice_facts("chat") + world.choice_facts("held_out"))

    kinds = [
        (0.12, _joined(rng, _statements(rng, to_state), 5, 18, " ")),
        (0.05, _themes(rng, to_state, stated)),
        (0.06, _profiles(rng, stated)),
        (0.20, _quizzes(rng, to_ask)),
        (0.15, _joined(rng, _exercises(rng, to_choose, world), 1, 3, "\n\n")),
        (0.30, _joined(rng, _letter_lists(rng, vocabulary), 1, 3, "\n\n")),
        (0.04, _joined(rng, _copying(rng, vocabulary, drills["copying"]), 4, 9, "\n")),
        (0.04, _joined(rng, _spelling(rng, vocabulary, drills["spelling"]), 4, 9, "\n")),
        (0.04, _joined(rng, _sums(rng, drills["arithmetic"]), 4, 9, "\n")),
    ]
    weights = [weight for weight, _ in kinds]
    written = 0
    while written < target_bytes:
        [(_, kind)] = rng.choices(kinds, weights)
        text = next(kind)
        written += len(text.encode())
        yield text


# --- prose


def prose_documents() -> list[str]:
    """Return English prose of this Python installation: standard-library docstrings and the pages of `help`.

    A document is a run of paragraphs of one module's docstrings or of one page. Repeated docstrings are left out.
    Source files are parsed, never imported. The order is fixed for an installation.
    """
    from pydoc_data.topics import topics

    sources = [[topics[name]] for name in sorted(topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if NOT_PROSE.isdisjoint(path.relative_to(library).parent.parts):
            sources.append(_docstrings(path))

    seen: set[str] = set()
    found: dict[str, None] = {}  # a set that keeps its order
    for texts in sources:
        paragraphs = []
        for text in dict.fromkeys(texts):
            if text not in seen:
                seen.add(text)
                paragraphs += _cleaned(text).split("\n\n")
        found.update(dict.fromkeys(_pages(paragraphs)))
    return list(found)


def _docstrings(path: Path) -> list[str]:
    """Return the docstrings of a source file's module, classes and functions; none if it cannot be parsed."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return [text for text in found if text and len(text) >= 20]


def _cleaned(text: str) -> str:
    """Return `text` without trailing blanks, control characters and runs of empty lines."""
    text = "\n".join(line.rstrip() for line in inspect.cleandoc(text).splitlines())
    text = "".join(c for c in text if c == "\n" or c.isprintable())
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _pages(paragraphs: Iterable[str]) -> Iterator[str]:
    """Join paragraphs into documents of up to about 3,000 characters. A last one below 100 is left out."""
    page = ""
    for paragraph in paragraphs:
        if page and len(page) + len(paragraph) > 3000:
            yield page
            page = ""
        page = f"{page}\n\n{paragraph}".strip()
    if len(page) >= 100:
        yield page
