"""The facts of the built-in world: what is true, how it is said and asked, and which of it conversations may show.

A fact is a relation between a subject and an answer, and its relation brings the wordings:

    Fact(capital, "France", "Paris")
        .sentence          The capital of France is Paris.
        .statement(rng)    In France, the capital is Paris.
        .question(rng)     do you know what the capital of France is

The facts stand in world_facts.txt, table by table; the wordings in world_phrases.txt, relation by relation.

The split. A hash puts each fact on one of two sides. Pretraining text states the facts of both sides. Conversations of
the fine-tuning stages use the "chat" side (70 %), and the benchmark asks the "held_out" side. So a chat model that
answers the benchmark cannot have learned the answers from conversations: it has carried them from pretraining through
every later stage. A hash needs no seed and no list of names, and it gives the same sides on every machine. It is taken
of the fact's family, because some facts give others away: "Paris is the capital of France" answers two questions.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import read_lists, read_sections

TABLES = Path(__file__).with_name("world_facts.txt")
PHRASES = Path(__file__).with_name("world_phrases.txt")

CHAT_SHARE = 0.7  # of all facts

LETTERS = "ABCD"  # of the four choices


def hash_fraction(name: str) -> float:
    """Return a number from 0 to below 1 that depends on `name` alone: the first 32 bits of its SHA-256."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def capitalized(text: str) -> str:
    """Return `text` with its first letter, and only that, in upper case."""
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    """Return `noun` after "a" or "an", by its spelling."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


@dataclass(frozen=True)
class Relation:
    """One kind of fact, with templates: {s} is the subject, {a} the answer, {an_s} and {an_a} have an article.

    The first of `statements` is also the answer in chats. Wrong choices come from facts with the same `category`.
    """

    name: str
    category: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One fact: `relation` holds between `subject` and `answer`. Facts of one `family` are on the same side."""

    relation: Relation
    subject: str
    answer: str
    family: str

    @property
    def side(self) -> str:
        """Return "chat" or "held_out"."""
        return "chat" if hash_fraction(self.family) < CHAT_SHARE else "held_out"

    @property
    def sentence(self) -> str:
        """Return the fact as chats state it: by the relation's first statement."""
        return self.fill(self.relation.statements[0])

    def statement(self, rng: random.Random) -> str:
        """Return the fact as a sentence in one of several wordings, at least every third time as chats state it."""
        if rng.random() < 0.35:
            return self.sentence
        return self.fill(rng.choice(self.relation.statements))

    def question(self, rng: random.Random) -> str:
        """Return a question that this fact answers, in one of many wordings, sometimes all in lower case."""
        text = self.fill(rng.choice(self.relation.questions))
        if rng.random() < 0.06 and self.relation.name != "symbol_of":  # in lower case, Co is no symbol
            return text.lower()
        return text

    def fill(self, template: str) -> str:
        """Return `template` with this fact's words, in upper case at the start if a word was put there."""
        text = template.format(
            s=self.subject,
            a=self.answer,
            an_s=with_article(self.subject),
            an_a=with_article(self.answer),
        )
        return capitalized(text) if template[0] == "{" else text


class World:
    """All facts, always in the same order, and what multiple choice needs to know about them."""

    def __init__(self) -> None:
        relations = read_relations()
        self.facts = [Fact(relations[name], *row) for name, *row in read_rows()]
        self.answers = _answers_by_category(self.facts)
        self.answers_on_side = {side: _answers_by_category(self.on_side(side)) for side in ("chat", "held_out")}
        self._by_answer: dict[tuple[str, str], list[Fact]] = {}
        for fact in self.facts:
            self._by_answer.setdefault((fact.relation.name, fact.answer), []).append(fact)

    def on_side(self, side: str) -> list[Fact]:
        """Return the facts of one side, "chat" or "held_out"."""
        return [fact for fact in self.facts if fact.side == side]

    def choice_facts(self, side: str) -> list[Fact]:
        """Return the facts of one side that can be asked with four choices."""
        return [fact for fact in self.on_side(side) if len(self.answers[fact.relation.category]) >= 5]

    def choices(self, fact: Fact, rng: random.Random) -> tuple[list[str], int]:
        """Return four choices for `fact` in random order, and the index of the right one.

        The wrong ones answer facts of the same category on the fact's own side. With names of the other side, the right
        answer could be guessed from which names occur in chats. A side with too few answers borrows from the other.
        """
        category = fact.relation.category
        not_wrong = (fact.answer, fact.subject)
        wrong = [answer for answer in self.answers_on_side[fact.side][category] if answer not in not_wrong]
        if len(wrong) < 3:
            wrong = [answer for answer in self.answers[category] if answer not in not_wrong]
        choices = rng.sample(wrong, 3)
        place = rng.randrange(4)
        choices.insert(place, fact.answer)
        return choices, place

    def choice_questions(
        self, fact: Fact, rng: random.Random, side: str | None = None
    ) -> tuple[list[str], list[tuple[Fact, str]]]:
        """Return four choices for `fact`, and up to four (fact, letter) to ask about them.

        Asked are `fact` and facts that another of the choices answers; with `side`, only facts of that side. They are
        drawn with replacement: if each letter came once, the last could be told by elimination.
        """
        choices, _ = self.choices(fact, rng)
        askable = []
        for choice, letter in zip(choices, LETTERS):
            if choice == fact.answer:
                found = [fact]
            else:
                found = self._by_answer.get((fact.relation.name, choice), [])
            if side:
                found = [other for other in found if other.side == side]
            if found:
                askable.append((found, letter))
        drawn = rng.choices(askable, k=len(askable))
        return choices, [(rng.choice(found), letter) for found, letter in drawn]


def _answers_by_category(facts: Iterable[Fact]) -> dict[str, list[str]]:
    """Return the answers to `facts`, sorted, for each category: {"city": ["Abuja", "Accra", ...], ...}."""
    found: dict[str, set[str]] = {}
    for fact in facts:
        found.setdefault(fact.relation.category, set()).add(fact.answer)
    return {category: sorted(answers) for category, answers in found.items()}


# --- the wordings, from world_phrases.txt


def read_relations() -> dict[str, Relation]:
    """Return every relation by its name, in the order of world_phrases.txt, which explains its own format."""
    sections = read_lists(PHRASES)
    relations = {}
    for heading, lines in sections.items():
        name, _, category = heading.partition(": ")
        if not category:  # frames that all relations share
            continue
        noun = ""
        clause = ""
        direct = []
        statements = []
        for line in lines:
            if line.startswith("noun: "):
                noun = line.removeprefix("noun: ")
            elif line.startswith("clause: "):
                clause = line.removeprefix("clause: ")
            elif line.endswith("?"):
                direct.append(line.removesuffix("?"))
            else:
                statements.append(line)
        if not clause:
            clause = f"what {noun} is"
            direct = [f"What is {noun}", f"What's {noun}", *direct]
        questions = _ways_to_ask(direct, clause, noun, sections)
        relations[name] = Relation(name, category, tuple(statements), tuple(questions))
    return relations


def _ways_to_ask(direct: list[str], clause: str, noun: str, sections: dict[str, list[str]]) -> list[str]:
    """Return templates of all ways to ask: direct or casual, as an indirect question, or by the bare noun.

    direct: "What is the capital of {s}", clause: "what the capital of {s} is", noun: "the capital of {s}", or "".
    """
    ways = []
    for question in direct:
        casual = question[0].lower() + question[1:]
        ways += [f"{question}?", f"{casual}?", casual, f"{question}, please?"]
        ways += [f"{opener} {question}?" for opener in sections["openers"]]
    ways += [frame.replace("{}", clause) for frame in sections["clause frames"]]
    if noun:
        short = noun.removeprefix("the ")
        ways += [frame.replace("{}", noun) for frame in sections["noun frames"]]
        ways += [short, f"{short}?", f"{capitalized(short)}?", f"{noun}?"]
    return list(dict.fromkeys(ways))  # each wording once


# --- the tables, from world_facts.txt


def read_rows() -> Iterator[tuple[str, str, str, str]]:
    """Yield every fact as (relation name, subject, answer, family), such as ("capital", "Peru", "Lima", "Peru")."""
    tables = read_sections(TABLES)

    for continent, countries in _groups(tables["countries"]):
        for item in countries:
            country, capital = item.split("=")
            if capital != "?":
                yield "capital", country, capital, country
                yield "capital_of", capital, country, country
            if continent != "?":
                yield "continent", country, continent, country
    for relation in ("language", "currency"):
        for answer, countries in _groups(tables[relation]):
            for country in countries:
                yield relation, country, answer, country

    for number, (symbol, element) in enumerate(_pairs(tables["elements"]), start=1):
        yield "symbol", element, symbol, element
        yield "symbol_of", symbol, element, element
        yield "number", element, str(number), element
        yield "number_of", str(number), element, element

    ordinals = tables["ordinals"].split()
    for ordinal, (planet, kind) in zip(ordinals, _pairs(tables["planets"], "=")):
        family = f"planet {planet}"  # Mercury is an element, too
        yield "order", planet, ordinal, family
        yield "order_of", ordinal, planet, family
        yield "planet", planet, kind, family

    for one, other in _pairs(tables["opposites"]):
        family = f"{one} {other}"
        yield "opposite", one, other, family
        yield "opposite", other, one, family
    for unit in ("day", "month"):
        cycle = tables[unit].split()
        for one, other in zip(cycle, cycle[1:] + cycle[:1]):
            family = f"{one} {other}"
            yield f"{unit}_after", one, other, family
            yield f"{unit}_before", other, one, family
    for ordinal, month in zip(ordinals, tables["month"].split()):
        family = f"{ordinal} {month}"
        yield "month_number", month, ordinal, family
        yield "month_at", ordinal, month, family

    for relation in ("class", "color"):
        for answer, items in _groups(tables[relation]):
            for item in items:
                # "an elephant" in the table of colors and "elephant" among the animals are one family.
                yield relation, item, answer, item.removeprefix("an ").removeprefix("a ")
    for relation in ("sound", "young", "plural", "past", "sides"):
        for one, other in _pairs(tables[relation]):
            yield relation, one, other, one
    for digits, word in _pairs(tables["word"]):
        yield "word", digits, word, f"number {digits}"


def _groups(table: str) -> Iterator[tuple[str, list[str]]]:
    """Yield ("mammal", ["dog", "cat"]), ("bird", ["owl"]) from "mammal: dog, cat; bird: owl"."""
    for group in " ".join(table.split()).split("; "):
        name, items = group.split(": ")
        yield name, items.split(", ")


def _pairs(table: str, separator: str = " ") -> Iterator[tuple[str, str]]:
    """Yield ("hot", "cold"), ("big", "small") from "hot cold, big small", where `separator` parts a pair."""
    for pair in " ".join(table.split()).split(", "):
        one, other = pair.split(separator, maxsplit=1)
        yield one, other
