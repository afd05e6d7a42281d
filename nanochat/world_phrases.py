"""How the facts of the built-in world are said and asked: one relation for each kind of fact."""

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """How one kind of fact is said and asked; {s} is the subject, {a} the answer, {an_s} and {an_a} with an article.

    The first of `statements` is also the answer sentence in chats. `direct` are questions without their question
    mark, `clause` is the indirect question ("what the capital of {s} is"), `noun` what is asked for, where it has
    a name. `category` groups the answers: plausible wrong choices come from the same category.
    """

    name: str
    category: str
    statements: tuple[str, ...]
    direct: tuple[str, ...]
    clause: str
    noun: str | None = None


def _named(name: str, category: str, noun: str, statements: tuple[str, ...], direct: tuple[str, ...] = ()) -> Relation:
    """A relation whose answer has a name of its own, as in "the capital of {s}"."""
    generic = (f"What is {noun}", f"What's {noun}")
    return Relation(name, category, statements, generic + direct, f"what {noun} is", noun)


RELATIONS = (
    _named("capital", "city", "the capital of {s}",
        ("The capital of {s} is {a}.", "{a} is the capital of {s}.", "The capital city of {s} is {a}.",
         "{s} has the capital {a}.", "{a} is the capital city of {s}.", "In {s}, the capital is {a}.",
         "The country {s} has {a} as its capital."),
        ("Which city is the capital of {s}", "What is the capital city of {s}", "Which city is {s}'s capital")),
    Relation("capital_of", "country", ("{s} is the capital of {a}.",),
        ("Which country has the capital {s}", "{s} is the capital of which country",
         "Of which country is {s} the capital",
         "What country has {s} as its capital"), "which country has the capital {s}"),
    Relation("continent", "continent",
        ("{s} is a country in {a}.", "{s} lies in {a}.", "The country {s} is in {a}.", "{s} belongs to {a}.",
         "{s} is found in {a}.", "The continent of {s} is {a}.", "One of the countries of {a} is {s}."),
        ("Which continent is {s} in", "What continent is {s} in", "Where is {s}", "On which continent is {s}",
         "In which part of the world is {s}"), "which continent {s} is in", "the continent of {s}"),
    _named("language", "language", "the main language of {s}",
        ("The main language of {s} is {a}.", "{a} is the main language of {s}.", "People in {s} speak {a}.",
         "In {s}, most people speak {a}.", "The language of {s} is {a}.", "In {s}, the main language is {a}."),
        ("Which language do people speak in {s}", "What language is spoken in {s}", "What do people speak in {s}")),
    _named("currency", "currency", "the currency of {s}",
        ("The currency of {s} is the {a}.", "The {a} is the currency of {s}.", "People in {s} pay with the {a}.",
         "In {s}, the currency is the {a}.", "The money of {s} is the {a}.", "Shops in {s} take the {a}."),
        ("Which currency is used in {s}", "What money do people use in {s}", "What currency does {s} use")),
    _named("symbol", "symbol", "the chemical symbol of {s}",
        ("The chemical symbol of {s} is {a}.", "{a} is the chemical symbol of {s}.", "The symbol of {s} is {a}.",
         "In chemistry, {s} is written {a}.", "The element {s} has the symbol {a}.", "{a} stands for {s}."),
        ("What is the symbol of {s}", "What is the symbol for {s}", "What is the chemical symbol for {s}",
         "How is {s} written in chemistry", "Which symbol does {s} have")),
    Relation("symbol_of", "element", ("{s} is the chemical symbol of {a}.",),
        ("Which element has the symbol {s}", "What does the symbol {s} stand for", "What element is {s}",
         "Which element is written {s}"), "which element has the symbol {s}"),
    _named("number", "atomic number", "the atomic number of {s}",
        ("The atomic number of {s} is {a}.", "{s} has the atomic number {a}.", "Element number {a} is {s}.",
         "The element {s} has number {a}.", "{s} is element {a}.", "The element with atomic number {a} is {s}."),
        ("Which atomic number does {s} have", "What number is the element {s}", "How many protons does {s} have")),
    Relation("number_of", "element", ("Element number {s} is {a}.",),
        ("Which element has the atomic number {s}", "What is element number {s}", "Which element is number {s}"),
        "which element has the atomic number {s}"),
    Relation("order", "ordinal",
        ("{s} is the {a} planet from the Sun.", "The {a} planet from the Sun is {s}.",
         "Counted from the Sun, {s} is the {a} planet.", "The planet {s} is the {a} from the Sun.",
         "{s} is planet number {a}, counted from the Sun.", "In our solar system, {s} is the {a} planet."),
        ("Which planet from the Sun is {s}", "What is the position of {s} from the Sun",
         "Counted from the Sun, which planet is {s}"), "which planet from the Sun {s} is"),
    Relation("order_of", "planet", ("The {s} planet from the Sun is {a}.",),
        ("Which planet is the {s} from the Sun", "What is the {s} planet from the Sun", "What is the {s} planet"),
        "which planet is the {s} from the Sun", "the {s} planet from the Sun"),
    Relation("planet", "planet kind",
        ("{s} is {an_a}.", "The planet {s} is {an_a}.", "{s} is known as {an_a}.", "We call {s} {an_a}.",
         "Among the planets, {s} is {an_a}.", "The kind of planet that {s} is: {a}."),
        ("What kind of planet is {s}", "What type of planet is {s}", "Which kind of planet is {s}"),
        "what kind of planet {s} is"),
    _named("opposite", "opposite", "the opposite of {s}",
        ("The opposite of {s} is {a}.", "{s} is the opposite of {a}.", "{s} and {a} are opposites.",
         "If it is not {s}, it may be {a}.", "The word {a} means the opposite of {s}.",
         "{s} against {a}: they are opposites.", "The reverse of {s} is {a}."),
        ("Which word is the opposite of {s}", "What is the antonym of {s}", "What word means the opposite of {s}")),
    _named("day_after", "day", "the day after {s}",
        ("The day after {s} is {a}.", "After {s} comes {a}.", "{a} comes after {s}.", "{a} follows {s}.",
         "When {s} is over, {a} begins.", "{s} is followed by {a}."),
        ("Which day comes after {s}", "What day comes after {s}", "What day follows {s}")),
    _named("day_before", "day", "the day before {s}",
        ("The day before {s} is {a}.", "Before {s} comes {a}.", "{a} comes before {s}.", "{a} is the day before {s}.",
         "If tomorrow is {s}, today is {a}.", "{s} is preceded by {a}."),
        ("Which day comes before {s}", "What day comes before {s}", "What day is before {s}")),
    _named("month_after", "month", "the month after {s}",
        ("The month after {s} is {a}.", "After {s} comes {a}.", "{a} comes after {s}.", "{a} follows {s}.",
         "When {s} is over, {a} begins.", "{s} is followed by {a}."),
        ("Which month comes after {s}", "What month comes after {s}", "What month follows {s}")),
    _named("month_before", "month", "the month before {s}",
        ("The month before {s} is {a}.", "Before {s} comes {a}.", "{a} comes before {s}.",
         "{a} is the month before {s}.", "If next month is {s}, this month is {a}.", "{s} is preceded by {a}."),
        ("Which month comes before {s}", "What month comes before {s}", "What month is before {s}")),
    Relation("month_number", "ordinal",
        ("{s} is the {a} month of the year.", "The {a} month of the year is {s}.",
         "The month {s} is the {a} of the year.", "In the calendar, {s} is the {a} month.",
         "Among the months, {s} is the {a}.", "{s} comes {a} among the months."),
        ("Which month of the year is {s}", "Which number in the year does the month {s} have",
         "What number is the month {s}"),
        "which month of the year {s} is"),
    Relation("month_at", "month", ("The {s} month of the year is {a}.",),
        ("Which month is the {s} of the year", "What is the {s} month of the year", "What is the {s} month"),
        "which month is the {s} of the year", "the {s} month of the year"),
    Relation("class", "animal class",
        ("{an_s} is {an_a}.", "The {s} is {an_a}.", "{an_s} belongs to the animals called {a}.",
         "Every {s} is {an_a}.", "We count the {s} as {an_a}.", "Among the animals, the {s} is {an_a}."),
        ("What kind of animal is {an_s}", "What type of animal is {an_s}", "What is {an_s}",
         "Which group of animals does {an_s} belong to"), "what kind of animal {an_s} is"),
    Relation("sound", "sound",
        ("{an_s} {a}.", "The {s} {a}.", "Every {s} {a}.", "Listen: the {s} {a}.", "When it makes a sound, {an_s} {a}.",
         "On the farm or in the wild, {an_s} {a}."),
        ("What sound does {an_s} make", "Which sound does {an_s} make", "What noise does {an_s} make",
         "How does {an_s} sound"), "what sound {an_s} makes", "the sound of {an_s}"),
    Relation("young", "young animal",
        ("A young {s} is called {an_a}.", "A baby {s} is {an_a}.", "The young of {an_s} is {an_a}.",
         "{an_a} grows up to be {an_s}.", "{an_a} is a young {s}.", "The child of {an_s} is called {an_a}."),
        ("What is a young {s} called", "What is a baby {s} called", "What do you call a young {s}",
         "What do you call a baby {s}"), "what a young {s} is called", "the young of {an_s}"),
    _named("color", "color", "the color of {s}",
        ("The color of {s} is {a}.", "{s} is {a}.", "{a} is the color of {s}.", "In color, {s} is {a}.",
         "{s} looks {a}.", "You can see that {s} is {a}."),
        ("What color is {s}", "Which color is {s}", "What color does {s} have")),
    _named("plural", "plural", "the plural of {s}",
        ("The plural of {s} is {a}.", "The plural form of {s} is {a}.", "One {s}, two {a}.", "One {s}, many {a}.",
         "{a} is the plural of {s}.", "We say one {s} but three {a}."),
        ("What is the plural form of {s}", "Which word is the plural of {s}", "How do you say more than one {s}")),
    _named("past", "past tense", "the past tense of {s}",
        ("The past tense of {s} is {a}.", "The past form of {s} is {a}.", "Today they {s}, yesterday they {a}.",
         "{a} is the past tense of {s}.", "In the past, {s} becomes {a}.", "The verb {s} has the past tense {a}."),
        ("What is the past form of {s}", "Which word is the past tense of {s}", "What is {s} in the past tense")),
    _named("word", "number word", "the word for {s}",
        ("The word for {s} is {a}.", "The number {s} is written {a}.", "{s} is {a} in words.",
         "{a} is the word for {s}.", "In words, {s} is {a}.", "We read {s} as {a}."),
        ("How do you write {s} in words", "What is {s} in words", "How is the number {s} written in words")),
    Relation("sides", "number of sides",
        ("{an_s} has {a} sides.", "The {s} has {a} sides.", "Every {s} has {a} sides.",
         "The number of sides of {an_s} is {a}.", "{an_s} is a shape with {a} sides.",
         "Count the sides of {an_s}: {a}."),
        ("How many sides does {an_s} have", "How many sides has {an_s}", "How many sides are there in {an_s}"),
        "how many sides {an_s} has", "the number of sides of {an_s}"),
)  # fmt: skip

_OPENERS = ("Please tell me: ", "Quick question: ", "Hi! ", "I have a question. ")
_CLAUSE_FRAMES = (
    "Do you know {}?", "do you know {}", "Can you tell me {}?", "can you tell me {}", "Tell me {}.",
    "Please tell me {}.", "I want to know {}.", "I would like to know {}.", "Could you tell me {}, please?",
    "I forgot {}. Can you help me?",
)  # fmt: skip
_NOUN_FRAMES = (
    "Tell me {}.", "tell me {}", "Give me {}.", "Name {}.", "Do you know {}?", "{}?", "{}", "Please name {}.",
    "I forgot {}. What is it?",
)  # fmt: skip


def capitalized(text: str) -> str:
    """`text` with its first letter, and only that, in upper case."""
    return text[:1].upper() + text[1:]


@functools.cache
def questions(relation: Relation) -> tuple[str, ...]:
    """Templates of every way to ask for a fact of `relation`: direct, casual, indirect, or by the bare noun."""
    result = []
    for direct in relation.direct:
        casual = direct[0].lower() + direct[1:]
        result += [direct + "?", direct + "?", casual + "?", casual, direct + ", please?"]
        result += [opener + direct + "?" for opener in _OPENERS]
    result += [frame.replace("{}", relation.clause) for frame in _CLAUSE_FRAMES]
    if relation.noun:
        short = relation.noun.removeprefix("the ")
        result += [frame.replace("{}", relation.noun) for frame in _NOUN_FRAMES]
        result += [short, short + "?", capitalized(short) + "?", relation.noun + "?"]
    return tuple(dict.fromkeys(result))
