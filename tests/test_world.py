"""The built-in world: true facts, two sides that never meet, text that states them all, and a CORE bundle."""

import ast
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from nanochat import world
from nanochat.world_core import core_bundle
from nanochat.world_facts import World, hash_fraction, read_relations, with_article

ROOT = Path(__file__).resolve().parent.parent
WORLD = World()
BY_KEY = {(fact.relation.name, fact.subject): fact for fact in WORLD.facts}


@pytest.mark.parametrize(
    "relation, subject, answer, sentence",
    [
        ("capital", "France", "Paris", "The capital of France is Paris."),
        ("capital", "the Netherlands", "Amsterdam", "The capital of the Netherlands is Amsterdam."),
        ("capital_of", "Mexico City", "Mexico", "Mexico City is the capital of Mexico."),
        ("continent", "the Philippines", "Asia", "The Philippines is a country in Asia."),
        ("language", "Brazil", "Portuguese", "The main language of Brazil is Portuguese."),
        ("currency", "Japan", "yen", "The currency of Japan is the yen."),
        ("symbol", "gold", "Au", "The chemical symbol of gold is Au."),
        ("symbol_of", "Pb", "lead", "Pb is the chemical symbol of lead."),
        ("number", "uranium", "92", "The atomic number of uranium is 92."),
        ("number_of", "118", "oganesson", "Element number 118 is oganesson."),
        ("order", "Mars", "fourth", "Mars is the fourth planet from the Sun."),
        ("planet", "Neptune", "ice giant", "Neptune is an ice giant."),
        ("opposite", "hot", "cold", "The opposite of hot is cold."),
        ("day_after", "Sunday", "Monday", "The day after Sunday is Monday."),
        ("month_before", "January", "December", "The month before January is December."),
        ("month_number", "October", "tenth", "October is the tenth month of the year."),
        ("class", "owl", "bird", "An owl is a bird."),
        ("sound", "dog", "barks", "A dog barks."),
        ("young", "owl", "owlet", "A young owl is called an owlet."),
        ("color", "a banana", "yellow", "The color of a banana is yellow."),
        ("plural", "mouse", "mice", "The plural of mouse is mice."),
        ("past", "go", "went", "The past tense of go is went."),
        ("word", "15", "fifteen", "The word for 15 is fifteen."),
        ("sides", "octagon", "8", "An octagon has 8 sides."),
    ],
)
def test_facts_are_true_and_said_in_english(relation, subject, answer, sentence):
    fact = BY_KEY[relation, subject]
    assert fact.answer == answer
    assert fact.sentence == sentence


def test_every_subject_has_one_answer():
    keys = Counter((fact.relation.name, fact.subject) for fact in WORLD.facts)
    assert [key for key, n in keys.items() if n > 1] == []


def test_tables_are_whole():
    sizes = Counter(fact.relation.name for fact in WORLD.facts)
    assert sizes["symbol"] == sizes["number"] == 118 and sizes["planet"] == 8
    assert sizes["day_after"] == 7 and sizes["month_after"] == 12
    assert sizes["capital"] == sizes["capital_of"] >= 185
    assert all(
        fact.subject.strip() == fact.subject and fact.answer.strip() == fact.answer != "" for fact in WORLD.facts
    )
    assert not any("?" in fact.subject + fact.answer for fact in WORLD.facts)
    # A chemical symbol is one or two letters of the element's name in some language: a slipped row would not fit 118.
    assert all(re.fullmatch("[A-Z][a-z]?", fact.answer) for fact in WORLD.facts if fact.relation.name == "symbol")


def test_reverse_twins_agree_and_share_a_side():
    twins = {"capital": "capital_of", "symbol": "symbol_of", "number": "number_of", "order": "order_of"}
    twins |= {
        "month_number": "month_at",
        "opposite": "opposite",
        "day_after": "day_before",
        "month_after": "month_before",
    }
    for fact in WORLD.facts:
        if twin_name := twins.get(fact.relation.name):
            twin = BY_KEY[twin_name, fact.answer]
            assert twin.answer == fact.subject
            assert twin.side == fact.side


def test_all_facts_of_a_country_or_element_share_a_side():
    sides: dict[str, set[str]] = {}
    for fact in WORLD.facts:
        if fact.relation.name in {"capital", "continent", "language", "currency", "symbol", "number", "class", "sound"}:
            sides.setdefault(fact.subject, set()).add(fact.side)
    assert all(len(found) == 1 for found in sides.values())


def test_sides_are_a_partition_of_about_70_to_30():
    chat, held_out = set(WORLD.on_side("chat")), set(WORLD.on_side("held_out"))
    assert chat | held_out == set(WORLD.facts) and not chat & held_out
    assert 0.6 < len(chat) / len(WORLD.facts) < 0.8
    for name in ("capital", "symbol", "opposite", "class", "past", "color"):
        assert {fact.side for fact in WORLD.facts if fact.relation.name == name} == {"chat", "held_out"}


def test_sides_are_the_same_in_any_process():
    share = sum(hash_fraction(f"item {i}") < 0.25 for i in range(4000)) / 4000
    assert abs(share - 0.25) < 0.03  # 4 sigma
    code = "from nanochat.world_facts import World; print(sorted(f.family for f in World().on_side('chat')))"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout != b""


@pytest.mark.parametrize("relation", read_relations().values(), ids=lambda relation: relation.name)
def test_relations_are_said_and_asked_in_many_ways(relation):
    reverse = relation.name.endswith(("_of", "_at"))
    assert len(set(relation.statements)) >= (1 if reverse else 6)
    forms = relation.questions
    assert len(forms) >= 20
    assert all("{s}" in form or "{an_s}" in form for form in forms) and not any("{a}" in form for form in forms)
    assert any(form.endswith("?") for form in forms) and any(form[0].islower() for form in forms)
    assert any(re.match("(please )?tell me", form, re.IGNORECASE) for form in forms)
    assert any(form.lower().startswith("do you know") for form in forms)
    assert any("please" in form.lower() for form in forms)


def test_a_question_names_the_subject_and_not_the_answer():
    rng = random.Random(0)
    for fact in WORLD.facts:
        text = fact.question(rng).lower()
        assert fact.subject.lower() in text
        if fact.answer not in fact.subject and len(fact.answer) > 4:
            assert not re.search(rf"\b{re.escape(fact.answer.lower())}\b", text.replace(fact.subject.lower(), ""))


def test_articles():
    assert [with_article(noun) for noun in ("owl", "dog", "ice giant")] == ["an owl", "a dog", "an ice giant"]


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(world.documents(0, 4_000_000))


def test_documents_are_a_function_of_seed_and_size(documents):
    again = list(world.documents(0, 50_000))
    other = list(world.documents(1, 50_000))
    assert again == documents[: len(again)]
    assert other != again


def test_documents_reach_their_size_and_are_fast():
    start = time.process_time()
    size = sum(len(text.encode()) for text in world.documents(3, 2_000_000))
    seconds = time.process_time() - start
    assert 2_000_000 <= size < 2_010_000
    assert size / seconds > 1e6  # bytes a second; measured 13 MB/s on a quiet core


def test_every_fact_of_both_sides_is_stated(documents):
    text = "\n".join(documents)
    missing = [fact.sentence for fact in WORLD.facts if fact.sentence not in text]
    assert missing == []
    assert text.count("The capital of France is Paris.") >= 5


def test_documents_are_plain_text_of_moderate_length(documents):
    assert all(20 <= len(text) <= 4000 for text in documents)
    assert not any("<|" in text for text in documents)


def test_counts_and_spellings_in_documents_are_right(documents):
    text = "\n".join(documents)
    calls = re.findall(r'("[^"\n]*"\.count\("\w"\)) = (\d+)\. The letter (\w) occurs (\d+) time', text)
    assert len(calls) > 500
    for call, result, letter, said in calls:
        word, asked = ast.literal_eval(call.replace(".count(", ", ").rstrip(")"))
        assert word.count(asked) == int(result) == int(said) and asked == letter
    spelled = re.findall(r"The word (\w+) is spelled ([\w-]+)\.", text)
    assert len(spelled) > 200 and all("-".join(word) == letters for word, letters in spelled)


def test_sums_in_documents_are_right(documents):
    lines = re.findall(r"(\d+)([-+*/])(\d+) = (-?\d+)\.", "\n".join(documents))
    assert len(lines) > 500 and {sign for _, sign, _, _ in lines} == set("+-*/")
    for a, sign, b, result in lines:
        assert eval(f"{a}{sign}{b}") == int(result)


def test_choices_hold_the_answer_once_and_letters_are_uniform():
    rng = random.Random(0)
    places = Counter()
    for fact in WORLD.choice_facts("chat") * 3:
        choices, place = WORLD.choices(fact, rng)
        assert choices[place] == fact.answer and len(set(choices)) == 4
        assert set(choices) <= set(WORLD.answers[fact.relation.category])
        places[place] += 1
    total = sum(places.values())
    assert all(abs(places[i] / total - 0.25) < 0.03 for i in range(4))


def test_a_category_too_small_for_four_choices_is_refused():
    fact = next(fact for fact in WORLD.facts if fact.relation.name == "planet")
    with pytest.raises(ValueError):
        WORLD.choices(fact, random.Random(0))


def test_choice_layout_puts_the_letter_right_after_its_choice():
    text = world.render_choices("Which?", "AB", ["Paris", "Rome"])
    assert text.split("\n")[1:] == ["- Paris=A", "- Rome=B", "Which?"]
    with pytest.raises(ValueError):
        world.render_choices("Which?", "ABC", ["Paris", "Rome"])


def test_pseudo_words_are_lower_case_and_words_hold_everyday_ones():
    rng = random.Random(0)
    assert all(re.fullmatch("[a-z]{3,}", world.pseudo_word(rng)) for _ in range(500))
    assert {"strawberry", "banana", "because"} <= set(world.words()) and len(world.words()) > 1500


# --- prose -----------------------------------------------------------------------------------------------------------


def test_prose_is_long_clean_and_without_repeats():
    documents = world.prose_documents()
    assert sum(len(text.encode()) for text in documents) > 1_000_000
    assert len(set(documents)) == len(documents)
    assert all(text == text.strip() and "\n\n\n" not in text for text in documents)
    assert all(c == "\n" or c.isprintable() for text in documents for c in text)
    assert sum(100 <= len(text) <= 3000 for text in documents) > 0.95 * len(documents)
    # An oracle from outside: the docstring of a module that Python itself shows.
    import textwrap

    assert any(textwrap.__doc__.strip().split("\n")[0] in text for text in documents)


# --- CORE bundle -----------------------------------------------------------------------------------------------------


def test_core_bundle_has_the_public_layout(tmp_path):
    core_bundle(tmp_path / "a")
    core_bundle(tmp_path / "b")
    config = yaml.safe_load((tmp_path / "a" / "core.yaml").read_text())["icl_tasks"]
    keys = {"multiple_choice": {"query", "choices", "gold"}, "schema": {"context_options", "continuation", "gold"}}
    keys["language_modeling"] = {"context", "continuation"}
    assert {task["icl_task_type"] for task in config} == set(keys)
    table = (tmp_path / "a" / "eval_meta_data.csv").read_text()
    public = ROOT.parent / "shared" / "data" / "eval_bundle" / "eval_meta_data.csv"
    if public.exists():
        assert table.splitlines()[0] == public.read_text().splitlines()[0]
    for task in config:
        path = tmp_path / "a" / "eval_data" / task["dataset_uri"]
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert 50 <= len(rows) <= 200
        assert all(set(row) == keys[task["icl_task_type"]] for row in rows)
        assert all(row["gold"] in (0, 1, 2, 3) for row in rows if "gold" in row)
        assert f"\n{task['label']}," in table
        assert path.read_bytes() == (tmp_path / "b" / "eval_data" / task["dataset_uri"]).read_bytes()


def test_core_rows_complete_to_true_sentences(tmp_path):
    core_bundle(tmp_path)
    true = {fact.sentence for fact in WORLD.facts}
    for task in yaml.safe_load((tmp_path / "core.yaml").read_text())["icl_tasks"]:
        for line in (tmp_path / "eval_data" / task["dataset_uri"]).read_text().splitlines():
            row = json.loads(line)
            if "query" in row:
                said = [f"{row['query']} {choice}." in true for choice in row["choices"]]
                assert said == [i == row["gold"] for i in range(4)]
            elif "context_options" in row:
                said = [f"{context} {row['continuation']}." in true for context in row["context_options"]]
                assert said == [i == row["gold"] for i in range(2)]
            else:
                assert f"{row['context']} {row['continuation']}." in true


def test_importing_reads_no_prose():
    code = "import sys, nanochat.world; assert 'pydoc_data.topics' not in sys.modules and 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
