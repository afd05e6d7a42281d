"""Chat tasks: right answers, judges that accept and reject, splits that never meet, the same items in any process."""

import ast
import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from nanochat.conversation import validate
from nanochat.tools import calculate
from nanochat.world_facts import World
from tasks.arithmetic import Arithmetic
from tasks.common import Multiturn, Task, TaskMixture, TaskSequence
from tasks.identity import Identity
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import Spelling, SpellingBee
from tasks.world import WorldChoice, WorldFacts

ROOT = Path(__file__).resolve().parent.parent
SMOLTALK = ROOT.parent / "shared" / "data" / "tasks"
TASKS = (WorldFacts, WorldChoice, Arithmetic, SpellingBee, Spelling, Identity)
WORLD = World()
each_task = pytest.mark.parametrize("task_class", TASKS, ids=lambda task_class: task_class.name)


def question(conversation) -> str:
    return conversation["messages"][0]["content"]


def exchanges(conversation):
    """Each turn's question and answer; in multiple choice the question's last line, and the choice at the letter."""
    choices = {at: choice for choice, at in re.findall(r"^- (.+)=([A-D])$", question(conversation), re.MULTILINE)}
    texts = [message["content"] for message in conversation["messages"]]
    found = []
    for asked, answer in zip(texts[::2], texts[1::2]):
        last_line = asked.split("\n")[-1]
        found.append((last_line, choices.get(answer, answer)))
    return found


def said(conversation) -> str:
    """The reference answer as an engine would decode it."""
    content = conversation["messages"][-1]["content"]
    marks = {"text": ("", ""), "python": ("<|python_start|>", "<|python_end|>")}
    marks["python_output"] = ("<|output_start|>", "<|output_end|>")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "".join(f"{marks[part['type']][0]}{part['text']}{marks[part['type']][1]}" for part in parts)


class Numbers(Task):
    """Conversation i is about the number i."""

    name = "numbers"

    def __init__(self, total, tag="n"):
        self.tag = tag
        super().__init__(total)

    def example(self, index):
        turns = [{"role": "user", "content": f"{self.tag}{index}"}, {"role": "assistant", "content": "ok"}]
        return {"messages": turns}


def tags(task) -> list[str]:
    return [question(task[i]) for i in range(len(task))]


# --- common ----------------------------------------------------------------------------------------------------------


def test_an_index_outside_ends_iteration():
    assert [question(c) for c in Numbers(3)] == ["n0", "n1", "n2"]
    with pytest.raises(IndexError):
        Numbers(3)[3]


def test_sequence_chains_tasks():
    assert tags(TaskSequence([Numbers(2, "a"), Numbers(3, "b")])) == ["a0", "a1", "b0", "b1", "b2"]


def test_mixture_is_a_shuffle_fixed_by_its_seed():
    parts = [Numbers(50, "a"), Numbers(30, "b")]
    mixed = tags(TaskMixture(parts, seed=1))
    assert sorted(mixed) == sorted(tags(TaskSequence(parts))) != mixed
    assert mixed == tags(TaskMixture(parts, seed=1)) != tags(TaskMixture(parts, seed=2))
    assert tags(TaskMixture(parts, seed=-1)) != mixed  # random.seed(-1) and random.seed(1) are the same
    for limit in (0, 5, 80, 99):
        assert tags(TaskMixture(parts, seed=1, limit=limit)) == mixed[:limit]


def test_a_task_named_twice_is_there_twice():
    part = Numbers(4, "a")
    assert Counter(tags(TaskMixture([part, part]))) == Counter({f"a{i}": 2 for i in range(4)})


def test_multiturn_joins_one_to_four_exchanges():
    chats = Multiturn(Numbers(300), seed=3)
    lengths = Counter(len(chats[i]["messages"]) // 2 for i in range(len(chats)))
    assert set(lengths) == {1, 2, 3, 4} and min(lengths.values()) > 40
    for i in range(len(chats)):
        validate(chats[i])
        assert question(chats[i]) == f"n{i}"


# --- every task ------------------------------------------------------------------------------------------------------


@each_task
def test_unknown_split_is_refused(task_class):
    with pytest.raises(ValueError, match="unknown split 'val'"):
        task_class("val")


@each_task
@pytest.mark.parametrize("split", ["train", "test"])
def test_conversations_are_valid_and_judged_right(task_class, split):
    task = task_class(split, size=400)
    for conversation in task:
        validate(conversation)
        assert task.evaluate(conversation, said(conversation)), conversation
        assert not task.evaluate(conversation, ""), conversation
        assert not task.evaluate(conversation, "I do not know."), conversation


@each_task
def test_train_and_test_share_no_conversation(task_class):
    sides = [{json.dumps(c["messages"]) for c in task_class(split, size=3000)} for split in ("train", "test")]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


@each_task
def test_training_wordings_vary(task_class):
    task = task_class("train", size=2000)
    assert len({question(conversation) for conversation in task}) > (0.85 if task_class is not Identity else 0.3) * 2000


def test_items_are_the_same_in_any_process():
    code = (
        "import hashlib, json; from tests.test_tasks import TASKS\n"
        "rows = [t(s)[i] for t in TASKS for s in ('train', 'test') for i in range(20)]\n"
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())"
    )
    command = [sys.executable, "-c", code]
    runs = [
        subprocess.run(command, cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] and len(runs[0].strip()) == 64


@each_task
def test_another_seed_gives_other_items_and_sizes_are_obeyed(task_class):
    first, second = task_class("train", size=300), task_class("train", size=300, seed=1)
    assert len(first) == len(second) == 300
    assert [question(c) for c in first] != [question(c) for c in second]


# --- world -----------------------------------------------------------------------------------------------------------


def test_no_training_conversation_states_a_held_out_fact():
    """Scan every question with its right answer for the two names of a held-out fact, as whole words."""
    names = {name.lower() for fact in WORLD.facts for name in (fact.subject, fact.answer)}
    alternatives = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    pattern = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)")
    held_out = {(fact.subject.lower(), fact.answer.lower()) for fact in WORLD.on_side("held_out")}
    chat = {fact.sentence for fact in WORLD.on_side("chat")}
    found = Counter()
    for conversation in itertools.chain(WorldFacts("train", size=6000), WorldChoice("train", size=6000)):
        for asked, answer in exchanges(conversation):
            assert "letters" in conversation or answer in chat
            stated = set(itertools.product(pattern.findall(asked.lower()), pattern.findall(answer.lower())))
            assert not stated & held_out, conversation
            found["names"] += bool(stated)
    assert found["names"] > 11_000  # the scan sees the facts that are there


def test_the_test_asks_every_held_out_fact_once():
    asked = Counter((c["category"], c["subject"], c["answer"]) for c in WorldFacts("test"))
    expected = Counter((f.relation.category, f.subject, f.answer) for f in WORLD.on_side("held_out"))
    assert asked == expected


def test_world_judge_reads_whole_words_in_any_case_and_rejects_other_answers():
    task = WorldFacts("train")
    conversation = {"category": "city", "subject": "France", "answer": "Paris"}
    for right in ("The capital of France is Paris.", "paris", "It's Paris!", "Paris, of course: Paris."):
        assert task.evaluate(conversation, right), right
    for wrong in ("The capital of France is Rome.", "Paris or Rome.", "Parisian", "Rome, not Paris", "France", ""):
        assert not task.evaluate(conversation, wrong), wrong


def test_world_judge_knows_names_inside_names():
    task = WorldFacts("train")
    cases = [
        ("city", "Mexico", "Mexico City", "The capital of Mexico is Mexico City.", True),
        ("city", "Singapore", "Singapore", "The capital of Singapore is Singapore.", True),
        ("city", "Singapore", "Singapore", "The capital of Singapore is Paris.", False),
        ("country", "Conakry", "Guinea", "Conakry is the capital of Guinea.", True),
        ("country", "Conakry", "Guinea", "Conakry is the capital of Papua New Guinea.", False),
        ("country", "Port of Spain", "Trinidad and Tobago", "Port of Spain is in Trinidad and Tobago.", True),
        ("country", "Amsterdam", "the Netherlands", "Amsterdam is the capital of Netherlands.", True),
        ("symbol", "cobalt", "Co", "The chemical symbol of cobalt is Co.", True),
        ("symbol", "cobalt", "Co", "The chemical symbol of cobalt is CO.", False),
        ("symbol", "iodine", "I", "I do not know.", False),
        ("symbol", "iodine", "I", "I is the symbol of iodine.", True),
        ("atomic number", "oxygen", "8", "The atomic number of oxygen is 8.", True),
        ("atomic number", "oxygen", "8", "The atomic number of oxygen is 80.", False),
        ("opposite", "hot", "cold", "The opposite of hot is cold.", True),
        ("opposite", "hot", "cold", "The opposite of hot is hot.", False),
        ("day", "Monday", "Tuesday", "The day after Monday is Wednesday.", False),
        ("number word", "100", "one hundred", "The word for 100 is one hundred.", True),
    ]
    for category, subject, answer, completion, right in cases:
        conversation = {"category": category, "subject": subject, "answer": answer}
        assert task.evaluate(conversation, completion) is right, completion


def test_choice_letters_are_uniform_and_the_answer_stands_at_its_letter():
    true = {(fact.subject.lower(), fact.answer) for fact in WORLD.facts}
    for split in ("train", "test"):
        task = WorldChoice(split, size=2000)
        letters = Counter()
        for conversation in task:
            letters.update(message["content"] for message in conversation["messages"][1::2])
            assert len(re.findall(r"^- .+=[A-D]$", question(conversation), re.MULTILINE)) == 4
            for asked, right in exchanges(conversation):
                assert any(subject in asked.lower() and answer == right for subject, answer in true)
        total = letters.total()
        assert (total > 2000) == (split == "train")  # in training, the same choices are asked about again
        assert all(abs(letters[letter] / total - 0.25) < 0.04 for letter in "ABCD")
    assert task.eval_type == "categorical" and task.baseline == 0.25 and conversation["letters"] == list("ABCD")


def test_held_out_answers_are_no_giveaway_in_training_choices():
    """A name that only ever is a wrong choice would be learned to be wrong."""
    wrong, right = set(), set()
    for conversation in WorldChoice("train", size=15000):
        right.update(answer for _, answer in exchanges(conversation))
        wrong.update(re.findall(r"^- (.+)=[A-D]$", question(conversation), re.MULTILINE))
    assert wrong - right <= {
        fact.answer for fact in WORLD.facts if fact.relation.category in ("day", "month", "ordinal")
    }


@pytest.mark.parametrize("split", ["train", "test"])
def test_arithmetic_results_are_those_of_python(split):
    for conversation in Arithmetic(split, size=2000):
        call, output, text = (part["text"] for part in conversation["messages"][-1]["content"])
        assert re.fullmatch(r"[\d.+*/()-]+", call)
        assert float(output) == pytest.approx(eval(call), rel=1e-9, abs=1e-9)
        assert text == f"{call} = {output}."


def test_arithmetic_calls_use_the_numbers_of_the_question():
    signs = Counter()
    for conversation in Arithmetic("train", size=2000):
        call = conversation["messages"][-1]["content"][0]["text"]
        assert sorted(re.findall(r"\d+", call)) == sorted(re.findall(r"\d+", question(conversation)))
        signs.update(re.findall(r"[-+*/]", call))
    assert all(signs[sign] > 200 for sign in "+-*/")


def test_arithmetic_operand_pairs_are_split():
    pairs = []
    for split in ("train", "test"):
        calls = (c["expression"] for c in Arithmetic(split, size=4000))
        pairs.append({tuple(re.findall(r"[\d.]+", call)[:2]) for call in calls})
    assert not pairs[0] & pairs[1]


def test_arithmetic_judge():
    task, conversation = Arithmetic("test"), {"expression": "37*48"}
    call = "<|python_start|>37*48<|python_end|><|output_start|>1776<|output_end|>"
    for right in (f"{call}37*48 = 1776.", f"{call}The result is 1776", f"{call}It is 1,776.", f"{call}1776.0"):
        assert task.evaluate(conversation, right), right
    for wrong in ("37*48 = 1776.", f"{call}37*48 = 1775.", call, f"{call}1776 is not 5.", "", f"{call}-1776"):
        assert not task.evaluate(conversation, wrong), wrong
    negative = {"expression": "5-12"}
    opening = "<|python_start|>5-12<|python_end|><|output_start|>-7<|output_end|>5-12 = "
    assert task.evaluate(negative, opening + "-7.") and not task.evaluate(negative, opening + "7.")


@pytest.mark.parametrize("split", ["train", "test"])
def test_letter_counts_are_those_of_python(split):
    counts = Counter()
    for conversation in SpellingBee(split, size=2000):
        call, output, text = (part["text"] for part in conversation["messages"][-1]["content"])
        shown, letter = ast.literal_eval(call.strip().replace(".count(", ", ").rstrip(")"))
        word = shown.strip()
        assert int(output) == shown.count(letter) == word.lower().count(letter) and calculate(call) == output
        assert word in question(conversation) and f"{output} time" in text and word in text
        counts[int(output)] += 1
    assert counts[0] > 100 and counts[1] > 100 and counts[2] > 100 and counts[3] > 5


def test_counting_calls_copy_the_word_as_it_is_tokenized():
    """The call's word and the question's are the same pieces under the split pattern, so that tokens are copied."""
    from nanochat.tokenizer import SPLIT_PATTERN

    regex = pytest.importorskip("regex")
    for conversation in SpellingBee("train", size=1500):
        call = conversation["messages"][-1]["content"][0]["text"]
        answer = conversation["messages"][-1]["content"][2]["text"]
        pieces = [regex.findall(SPLIT_PATTERN, text) for text in (question(conversation), call, answer)]
        shown = next(piece for piece in pieces[1] if conversation["word"] in piece)
        assert shown in pieces[0] and shown in pieces[2], (conversation, pieces)


def test_counted_words_are_split():
    for task_class in (SpellingBee, Spelling):
        train, test = ({c["word"].lower() for c in task_class(split, size=4000)} for split in ("train", "test"))
        assert train and test and not train & test


def test_counting_judge():
    task, conversation = SpellingBee("test"), {"word": "strawberry", "letter": "r"}
    call = '<|python_start|>" strawberry".count("r")<|python_end|><|output_start|>3<|output_end|>'
    assert task.evaluate(conversation, f"{call}The letter r occurs 3 times in strawberry.")
    for wrong in (f"{call}The letter r occurs 2 times.", call, "", "three"):
        assert not task.evaluate(conversation, wrong), wrong


def test_spelling_judge():
    task, conversation = Spelling("test"), {"word": "apple"}
    assert task.evaluate(conversation, "a-p-p-l-e") and task.evaluate(conversation, " a-p-p-l-e. ")
    assert not task.evaluate(conversation, "a-p-l-e") and not task.evaluate(conversation, "apple")


def test_identity_tests_wordings_that_training_never_shows():
    def core(text: str) -> str:
        return re.sub(r"^(hi! |hello\. |hey, |one question: )", "", text.lower()).rstrip("?.!")

    train, test = ({core(question(c)) for c in Identity(split)} for split in ("train", "test"))
    assert len(train) > 100 and len(test) > 40 and not train & test


def test_identity_says_its_name_and_has_every_intent_on_both_sides():
    answers = [{c["messages"][-1]["content"] for c in Identity(split)} for split in ("train", "test")]
    assert answers[0] == answers[1] and len(answers[0]) >= 9
    assert any("nanochat" in answer and "small language model" in answer for answer in answers[0])
    task = Identity("test")
    name = next(c for c in task if c["messages"][-1]["content"].startswith("My name"))
    assert task.evaluate(name, "I am NanoChat.") and not task.evaluate(name, "The capital of France is Paris.")


def test_smoltalk_skips_and_counts_invalid_conversations(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [good, good[::-1], [], [good[0], {"role": "assistant", "content": ""}], good + good]
    (tmp_path / "smoltalk").mkdir()
    pq.write_table(pa.table({"messages": rows}), tmp_path / "smoltalk" / "train.parquet")
    task = SmolTalk("train", tasks_dir=tmp_path)
    assert len(task) == 2 and task.skipped == 3
    assert task[0]["messages"] == good and task[1]["messages"] == good + good


def test_smoltalk_names_what_is_missing_or_broken(tmp_path):
    with pytest.raises(ValueError, match=r"smoltalk.test\.parquet is missing"):
        SmolTalk("test", tasks_dir=tmp_path)
    (tmp_path / "smoltalk").mkdir()
    (tmp_path / "smoltalk" / "test.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="not a Parquet file"):
        SmolTalk("test", tasks_dir=tmp_path)


@pytest.mark.skipif(not SMOLTALK.is_dir(), reason="needs ../shared/data/tasks")
def test_real_smoltalk_is_readable():
    task = SmolTalk("test", tasks_dir=SMOLTALK)
    assert len(task) + task.skipped == 502 and task.skipped < 25
    validate(task[random.Random(0).randrange(len(task))])
