"""The facts of the built-in world: what is true, how it is stated and asked, and on which of two sides each fact is.

A hash puts each fact on a side. "chat" facts may appear in fine-tuning conversations. "held_out" facts appear in
pretraining text alone, so a chat model that answers them has carried knowledge through the stages. The facts are listed
in world_facts.txt, the wordings in world_phrases.txt.
"""

import functools
import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import read_lists, read_sections


@dataclass(frozen=True)
class Relation:
    """One kind of fact, with templates: {s} is the subject, {a} the answer, {an_s} and {an_a} have an article.

    The first of `statements` is also the answer in chats. `direct` are questions without their question mark, `clause`
    is the indirect question ("what the capital of {s} is"), and `noun` is what is asked for, if it has a name. Wrong
    choices come from the same `category` of answers.
    """

    name: str
    category: str
    statements: tuple[str, ...]
    direct: tuple[str, ...]
    clause: str
    noun: str | None = None


def _phrases() -> dict[str, list[str]]:
    return read_lists(Path(__file__).with_name("world_phrases.txt"))


@functools.cache
def relations() -> dict[str, Relation]:
    """Return every kind of fact by its name, in the order of world_phrases.txt, which explains its own format."""
    found = {}
    for heading, lines in _phrases().items():
        name, _, category = heading.partition(": ")
        if not category:  # a section of frames
            continue
        stated = dict(line.split(": ") for line in lines if line.startswith(("noun: ", "clause: ")))
        noun, clause = stated.get("noun"), stated.get("clause")
        questions = [line.removesuffix("?") for line in lines if line.endswith("?")]
        if clause is None:  # the answer has a name of its own, as in "the capital of {s}"
            clause, questions = f"what {noun} is", [f"What is {noun}", f"What's {noun}", *questions]
        statements = (line for line in lines[len(stated) :] if not line.endswith("?"))
        found[name] = Relation(name, category, tuple(statements), tuple(questions), clause, noun)
    return found


def capitalized(text: str) -> str:
    """Return `text` with its first letter, and only that, in upper case."""
    return text[:1].upper() + text[1:]


@functools.cache
def questions(relation: Relation) -> tuple[str, ...]:
    """Return templates of all ways to ask for a fact: direct, casual, indirect, or by the bare noun."""
    result: list[str] = []
    phrases = _phrases()
    for direct in relation.direct:
        casual = direct[0].lower() + direct[1:]
        result += [direct + "?", direct + "?", casual + "?", casual, direct + ", please?"]
        result += [f"{opener} {direct}?" for opener in phrases["openers"]]
    result += [frame.replace("{}", relation.clause) for frame in phrases["clause frames"]]
    if relation.noun:
        short = relation.noun.removeprefix("the ")
        result += [frame.replace("{}", relation.noun) for frame in phrases["noun frames"]]
        result += [short, short + "?", capitalized(short) + "?", relation.noun + "?"]
    return tuple(dict.fromkeys(result))


def side_of(item: str, first: str = "chat", second: str = "held_out", share: float = 0.7) -> str:
    """Return `first` for about `share` of all item names, else `second`, by the name's SHA-256 alone."""
    digest = hashlib.sha256(item.encode()).digest()
    return first if int.from_bytes(digest[:4], "big") < share * 2**32 else second


def with_article(noun: str) -> str:
    """Return `noun` after "a" or "an", by its spelling."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


@dataclass(frozen=True)
class Fact:
    """One fact: `relation` holds between `subject` and `answer`. Facts of one `family` are on the same side."""

    relation: Relation
    subject: str
    answer: str
    family: str

    def fill(self, template: str) -> str:
        """Return `template` with this fact's words. It starts in upper case if it starts with one of them."""
        text = template.format(
            s=self.subject,
            a=self.answer,
            an_s=with_article(self.subject),
            an_a=with_article(self.answer),
        )
        return capitalized(text) if template[0] == "{" else text

    @property
    def sentence(self) -> str:
        """The answer in a chat: the relation's first statement."""
        return self.fill(self.relation.statements[0])

    def statement(self, rng: random.Random) -> str:
        """Return the fact as a sentence; about every third time in the words of a chat's answer."""
        statements = self.relation.statements
        return self.fill(statements[0] if rng.random() < 0.35 else rng.choice(statements))

    def question(self, rng: random.Random) -> str:
        """Return a question for the fact in one of the ways of `questions`, sometimes all in lower case."""
        text = self.fill(rng.choice(questions(self.relation)))
        return text.lower() if rng.random() < 0.06 and self.relation.name != "symbol_of" else text


def _groups(table: str, separator: str) -> list[tuple[str, list[str]]]:
    """Parse "name: item, item" groups, which `separator` parts."""
    rows = [row.split(":") for row in re.split(separator, table) if row.strip()]
    return [(name.strip(), [item.strip() for item in " ".join(items.split()).split(",")]) for name, items in rows]


def _pairs(table: str, separator: str = " ") -> list[tuple[str, str]]:
    """Parse "left right" pairs, which commas part."""
    return [(a, b) for a, b in (pair.strip().split(separator, 1) for pair in " ".join(table.split()).split(","))]


def _rows() -> Iterator[tuple[str, str, str, str]]:
    """Yield every fact as (relation name, subject, answer, family)."""
    tables = read_sections(Path(__file__).with_name("world_facts.txt"))
    for continent, countries in _groups(tables["countries"], r"\n(?=[A-Z?][\w ]*: )"):
        for country, capital in (item.split("=") for item in countries):
            if capital != "?":
                yield "capital", country, capital, country
                yield "capital_of", capital, country, country
            if continent != "?":
                yield "continent", country, continent, country
    for name in ("language", "currency"):
        for answer, countries in _groups(tables[name], ";"):
            yield from ((name, country, answer, country) for country in countries)
    for number, (symbol, element) in enumerate(_pairs(tables["elements"]), start=1):
        yield "symbol", element, symbol, element
        yield "symbol_of", symbol, element, element
        yield "number", element, str(number), element
        yield "number_of", str(number), element, element
    ordinals = tables["ordinals"].split()
    for ordinal, (planet, kind) in zip(ordinals, _pairs(tables["planets"], "=")):
        yield "order", planet, ordinal, f"planet {planet}"
        yield "order_of", ordinal, planet, f"planet {planet}"
        yield "planet", planet, kind, f"planet {planet}"
    for one, other in _pairs(tables["opposites"]):
        yield "opposite", one, other, f"{one} {other}"
        yield "opposite", other, one, f"{one} {other}"
    for unit in ("day", "month"):
        cycle = tables[unit].split()
        for one, other in zip(cycle, cycle[1:] + cycle[:1]):
            yield f"{unit}_after", one, other, f"{one} {other}"
            yield f"{unit}_before", other, one, f"{one} {other}"
    for ordinal, month in zip(ordinals, tables["month"].split()):
        yield "month_number", month, ordinal, f"{ordinal} {month}"
        yield "month_at", ordinal, month, f"{ordinal} {month}"
    for name in ("class", "color"):
        for answer, items in _groups(tables[name], ";"):
            yield from ((name, item, answer, item.removeprefix("an ").removeprefix("a ")) for item in items)
    for name in ("sound", "young", "plural", "past", "sides"):
        yield from ((name, one, other, one) for one, other in _pairs(tables[name]))
    yield from (("word", number, word, f"number {number}") for number, word in _pairs(tables["word"]))


@functools.cache
def facts() -> tuple[Fact, ...]:
    """Return all facts of the world, always in the same order."""
    return tuple(Fact(relations()[name], *row) for name, *row in _rows())


def fact_side(fact: Fact) -> str:
    """Return "chat" or "held_out", by the hash of the fact's family."""
    return side_of(fact.family)


@functools.cache
def facts_on(side: str) -> tuple[Fact, ...]:
    """Return the facts of one side."""
    return tuple(fact for fact in facts() if fact_side(fact) == side)
