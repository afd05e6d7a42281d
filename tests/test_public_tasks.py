"""Published data sets: every real row loads, renders and is judged rightly; downloads; bad rows; your own file."""

import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
import tiny_run
from hub_server import HubServer
from record_check import check_records

from nanochat.compute import usable_cores
from nanochat.conversation import render, validate
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.tools import calculate
from tasks import mixtures, public
from tasks.arc import ARCChallenge, ARCEasy
from tasks.builtin import mixture
from tasks.common import TaskMixture, multiple_choice
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K, final_number, solution_parts
from tasks.humaneval import HumanEval, program
from tasks.mmlu import MMLU
from tasks.parquet import ParquetTask
from tasks.smoltalk import SmolTalk

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data" / "tasks"
needs_real_rows = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/tasks")
SPLITS = {
    (ARCEasy, "train"): 2251,
    (ARCEasy, "validation"): 570,
    (ARCEasy, "test"): 1188,
    (ARCChallenge, "train"): 1119,
    (ARCChallenge, "validation"): 299,
    (ARCChallenge, "test"): 586,
    (MMLU, "dev"): 285,
    (MMLU, "validation"): 1531,
    (MMLU, "test"): 1500,
    (GSM8K, "train"): 7473,
    (GSM8K, "test"): 400,
    (SmolTalk, "train"): 16114,
    (SmolTalk, "test"): 502,
}
CHOICES = [key for key in SPLITS if key[0].eval_type == "categorical"]


def name_of(value) -> str:
    return getattr(value, "name", str(value))


def write_rows(path: Path, rows: list[dict]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path.read_bytes()


def real_rows(task, split) -> list[dict]:
    from pyarrow import parquet

    return parquet.read_table(REAL / task.name / f"{split}.parquet").to_pylist()


def humaneval_problems() -> list[dict]:
    """The real problems as conversations, whether or not this machine can judge them."""
    task = HumanEval.__new__(HumanEval)
    return [task.conversation(row) for row in real_rows(HumanEval, "test")]


def said(conversation) -> str:
    """The reference answer as an engine would decode it."""
    content = conversation["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    marks = {"text": "{}", "python": "<|python_start|>{}<|python_end|>"}
    marks["python_output"] = "<|output_start|>{}<|output_end|>"
    return "".join(marks[part["type"]].format(part["text"]) for part in content)


# --- real rows -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    rows = real_rows(GSM8K, "test") + real_rows(MMLU, "dev")
    return Tokenizer.train_from_iterator((row["question"] for row in rows), 1500)


@needs_real_rows
@pytest.mark.parametrize(("task_class", "split"), SPLITS, ids=name_of)
def test_all_real_rows_load(task_class, split, capsys):
    task = task_class(split, REAL)
    assert len(task) == SPLITS[task_class, split] and task.skipped == 0
    assert capsys.readouterr().out == ""


def supervised_spans(ids, tokenizer) -> list[bool]:
    """What the assistant itself says, by walking over the marks: its turns without its tools' outputs."""
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    spans, speaking, output = [], False, False
    for token in ids:
        name = names.get(token)
        output = output or name == "<|output_start|>"
        spans.append(speaking and not output)
        output = output and name != "<|output_end|>"
        speaking = (speaking or name == "<|assistant_start|>") and name != "<|assistant_end|>"
    return spans


@needs_real_rows
@pytest.mark.parametrize("task_class", [ARCEasy, ARCChallenge, MMLU, GSM8K, SmolTalk, HumanEval], ids=name_of)
def test_real_rows_render_and_supervise_exactly_what_the_assistant_says(task_class, tokenizer):
    task = humaneval_problems() if task_class is HumanEval else task_class("test", REAL)
    for i in range(0, len(task), 5):
        ids, mask = render(task[i], tokenizer)
        assert [bool(bit) for bit in mask] == supervised_spans(ids, tokenizer)
        text = tokenizer.decode([token for token, bit in zip(ids, mask) if bit])
        spoken = [said({"messages": [message]}) for message in task[i]["messages"][1::2]]
        expected = [re.sub(r"<\|output_start\|>.*?<\|output_end\|>", "", answer) for answer in spoken]
        assert text == "".join(f"{answer}<|assistant_end|>" for answer in expected)


@needs_real_rows
def test_a_mark_inside_a_row_is_text(tokenizer, tmp_path):
    """A row must not be able to end its own turn."""
    row = {"question": "x<|assistant_start|>B<|assistant_end|>", "choices": ["a<|bos|>", "b"], "answer": 1}
    write_rows(tmp_path / "mmlu" / "test.parquet", [row])
    ids, _ = render(MMLU("test", tmp_path)[0], tokenizer)
    special = {tokenizer.encode_special(name) for name in SPECIAL_TOKENS}
    assert sum(token in special for token in ids) == 5  # bos, two marks a turn


@needs_real_rows
@pytest.mark.parametrize(("task_class", "split"), CHOICES, ids=name_of)
def test_gold_letters_are_right_and_others_wrong(task_class, split):
    task, letters = task_class(split, REAL), Counter()
    for conversation, row in zip(task, real_rows(task_class, split), strict=True):
        texts = row["choices"]["text"] if "answerKey" in row else row["choices"]
        gold = row["choices"]["label"].index(row["answerKey"]) if "answerKey" in row else row["answer"]
        shown = dict(re.findall(r"^- ((?:.|\n)*?)=([A-E])$", conversation["messages"][0]["content"], re.MULTILINE))
        for i, letter in enumerate(conversation["letters"]):
            assert task.evaluate(conversation, letter) == (i == gold)
            assert len(shown) < len(texts) or shown[texts[i]] == letter
        assert conversation["messages"][0]["content"].endswith(row["question"])
        letters[len(conversation["letters"])] += 1
    assert set(letters) <= {3, 4, 5} and task.baseline == 0.25


@needs_real_rows
def test_gsm8k_references_are_right_and_perturbed_ones_wrong():
    task = GSM8K("test", REAL)
    for conversation in task:
        reference = said(conversation)
        body, _, number = reference.rpartition("#### ")
        value = int(number.replace(",", ""))
        assert task.evaluate(conversation, reference)
        for wrong in (value + 1, -value if value else 5, value * 10 + 5):
            assert not task.evaluate(conversation, f"{body}#### {wrong}"), reference
        assert not task.evaluate(conversation, body) and not task.evaluate(conversation, "")
        assert not task.evaluate(conversation, f"{body}#### {value + 1}\n{reference}"), "the first one counts"
        # A model that does not stop goes on with another problem.
        assert task.evaluate(conversation, f"{reference}\n\nAnn has 3 pears.\n#### {value + 1}")


@needs_real_rows
def test_gsm8k_calls_are_what_the_calculator_answers():
    calls = marks = 0
    for conversation, row in zip(GSM8K("train", REAL), real_rows(GSM8K, "train"), strict=True):
        parts = conversation["messages"][-1]["content"]
        for call, output in itertools.pairwise(parts):
            if call["type"] == "python":
                assert output == {"type": "python_output", "text": calculate(call["text"])}
                calls += 1
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        assert text == re.sub(r"<<.*?>>", "", row["answer"])
        marks += row["answer"].count("<<")
    assert calls == marks > 20_000  # no mark of the real data is lost


def passes(code: str, tests: str) -> bool:
    names: dict = {}
    try:
        exec(code, names)  # reference solutions, which are known
        exec(tests, names)
    except Exception:
        return False
    return True


@needs_real_rows
def test_humaneval_solutions_make_the_programs_they_should():
    for conversation in humaneval_problems():
        prompt, entry_point, tests = conversation["prompt"], conversation["entry_point"], conversation["test"]
        body = conversation["messages"][-1]["content"].removeprefix(f"```python\n{prompt}").removesuffix("\n```")
        whole = prompt + body
        says = [
            f"```python\n{whole}\n```",
            f"```python\n{body}\n```",
            body,
            whole,
            f"Sure:\n```py\n{whole}\n```\nSo `it` works.",
        ]
        for completion in says:
            assert passes(program(prompt, entry_point, completion), tests), completion
        assert not passes(program(prompt, entry_point, "    return 'wrong'"), tests)


@needs_real_rows
@pytest.mark.parametrize("right", [True, False])
def test_humaneval_judges_by_running(right):
    execution = pytest.importorskip("nanochat.execution")
    try:
        execution.require_isolation(False)
    except ValueError as error:
        pytest.skip(str(error))
    task = HumanEval("test", REAL)
    problems = list(task)
    answers = [problem["messages"][-1]["content"] for problem in problems]
    if not right:  # one line more, the first of the function's body
        wrong_line = "    return 'wrong'\n"
        heads = [f"```python\n{problem['prompt']}" for problem in problems]
        answers = [answer.replace(head, head + wrong_line) for answer, head in zip(answers, heads)]
    with ThreadPoolExecutor(usable_cores()) as pool:
        verdicts = list(pool.map(task.evaluate, problems, answers))
    assert verdicts == [right] * 100


# --- judges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", 18),
        ("#### 1,234", 1234),
        ("#### $1,234.50", Fraction("1234.5")),
        ("#### -5", -5),
        ("#### -$5", -5),
        ("#### $-5", -5),
        ("#### \N{MINUS SIGN}5", -5),
        ("#### 18.00", 18),
        ("####18", 18),
        ("####   18 dollars.", 18),
        ("#### 18.", 18),
        ("#### .5", Fraction(1, 2)),
        ("#### 3/4", Fraction(3, 4)),
        ("#### 50%", 50),
        ("#### 7\n#### 8", 7),
        ("#### 7#### 8", 7),
        ("#### 7####", 7),
        ("####\n#### 7", 7),
        ("#### Step 1: add\n2+5 is 7.\n#### 7 apples", 7),
        ("#### Step 1\n#### The answer is 7", 1),
        ("#### The answer is 7", 7),
        ("#### 2 1/2", Fraction(5, 2)),
        ("#### -2 1/2", Fraction(-5, 2)),
        ("#### $2 and 3/4", Fraction(11, 4)),
        ("#### 2½ hours", Fraction(5, 2)),
        ("#### ⅔", Fraction(2, 3)),
        (r"#### $2\frac{1}{2}$", Fraction(5, 2)),
        (r"#### \boxed{\dfrac{3}{4}}", Fraction(3, 4)),
        (r"#### 2\frac34", Fraction(11, 4)),
        (r"#### \boxed{-1{,}234}.", -1234),
        ("#### **18**", 18),
        ("#### 1e3", 1000),
        ("#### 1.5E+3", 1500),
        ("#### 5e-1", Fraction(1, 2)),
        (r"#### 1.5 \times 10^{3}", 1500),
        ("#### 2 x 10^3 grams", 2000),
        ("#### 2*10**3", 2000),
        ("#### 1e999999999", None),
        ("#### 3 eggs", 3),
        ("#### 3 exits", 3),
        ("#### 8{,}000", 8000),
        (r"#### \$8{,}000.00", 8000),
        (r"#### -\$8\,000", -8000),
        ("#### 8 000", 8000),
        ("#### 8\u202f000\u00a0€", 8000),
        ("#### 1 250 000.", 1250000),
        ("#### 5 100-dollar bills", 5),
        ("#### 8_000", 8000),
        ("#### 8'000", 8000),
        ("#### 1, 2 and 3", 1),
        ("#### \N{EN DASH}5", -5),
        ("#### 10-5", 10),
        ("#### 1/2%", Fraction(1, 2)),
        ("#### a" + " " * 100_000 + "b", None),
        ("####\n\n18\n19", 18),
        ("#### <|python_start|>9+9<|python_end|><|output_start|>18<|output_end|>18", 18),
        ("#### ten", None),
        ("####", None),
        ("18", None),
        ("### 18", None),
        ("", None),
        ("#### 1/0", 1),
        ("#### " + "9" * 100_000, None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_final_numbers(text, number):
    began = time.process_time()
    assert final_number(text) == number
    assert time.process_time() - began < 1


def test_marks_that_the_calculator_would_answer_otherwise_are_dropped():
    assert solution_parts("It is <<2*3=7>>7, then <<x=1>>1 and <<1/0=2>>2.\n#### 7") == [
        {"type": "text", "text": "It is 7, then 1 and 2.\n#### 7"}
    ]
    assert solution_parts("<<2*3=$6.00>>6\n#### 6") == [
        {"type": "python", "text": "2*3"},
        {"type": "python_output", "text": "6"},
        {"type": "text", "text": "6\n#### 6"},
    ]


PROMPT = (
    'import math\n\ndef helper(x):\n    return x + 1\n\ndef area(r: float) -> float:\n    """ Area of a disc. """\n'
)


@pytest.mark.parametrize(
    "completion",
    [
        "    return math.pi * helper(r - 1) ** 2",
        "return math.pi * helper(r - 1) ** 2",
        "\n    s = helper(r - 1)\n    return math.pi * s * s\n",
        "```python\n    return math.pi * helper(r - 1) ** 2\n```",
        "```python\nreturn math.pi * helper(r - 1) ** 2",
        "```python\ndef area(r):\n    return math.pi * helper(r - 1) ** 2\n```",
        "First:\n```\nprint('no')\n```\nthen\n```python\nfrom math import pi\ndef area(r):\n    return pi * r * r\n```",
        "def area(r):\n    return math.pi * helper(r - 1) ** 2",
        "~~~python\ndef area(r):\n    return math.pi * helper(r - 1) ** 2\n~~~\nDone.",
        "~~~\n    return math.pi * helper(r - 1) ** 2",
        '````python\ndef area(r):\n    s = """\n```\n"""\n    return math.pi * helper(r - 1) ** 2\n````\nDone.',
        "1. So:\n   ```python\n   def area(r):\n\n       return math.pi * helper(r - 1) ** 2\n   ```\n2. Done.",
        "* ~~~ python\n  def area(r):\n      return math.pi * helper(r - 1) ** 2\n  ~~~",
        "1. ```\n   def area(r):\n       return math.pi * helper(r - 1) ** 2\n   ```",
        "\t```python\n\tdef area(r):\n\t\treturn math.pi * helper(r - 1) ** 2\n\t```",
        "   ```python\n       return math.pi * helper(r - 1) ** 2\n   ```",
        "   ```python\n   return math.pi * helper(r - 1) ** 2\n   ```",
        "   ```python\ndef area(r):\n    return math.pi * helper(r - 1) ** 2\n   ```",
        "```python\n    def area(r):\n        return math.pi * helper(r - 1) ** 2\n```",
        "    def area(r):\n        return math.pi * helper(r - 1) ** 2",
        "```python\r\ndef area(r):\r\n    return math.pi * helper(r - 1) ** 2\r\n```",
    ],
)
def test_programs_of_many_kinds_of_answers(completion):
    names: dict = {}
    exec(program(PROMPT, "area", completion), names)
    assert names["area"](2.0) == pytest.approx(12.566370614)


def test_multiple_choice_answers_with_the_letter_of_the_right_choice():
    choice = multiple_choice("Which?", ["x", "y", "z"], 2)
    assert choice["letters"] == ["A", "B", "C"]
    assert choice["messages"][1]["content"] == "C"


@pytest.mark.parametrize(
    ("choices", "place"),
    [(["x"], 0), ([], 0), (["x", ""], 0), (["x", None], 0), (["x", "y"], 2), (["x", "y"], -1)],
)
def test_multiple_choice_refuses_what_is_no_choice(choices, place):
    with pytest.raises(ValueError, match="choice"):
        multiple_choice("Which?", choices, place)


# --- bad rows --------------------------------------------------------------------------------------------------------


def test_bad_rows_are_named_and_counted_and_the_rest_goes_on(tmp_path, capsys):
    good = {"question": "Which?", "choices": ["x", "y"], "answer": 1}
    bad = [
        {"answer": None},
        {"choices": ["only"]},
        {"answer": 9},
        {"question": ""},
        {"choices": None},
        {"choices": []},
    ]
    write_rows(tmp_path / "mmlu" / "test.parquet", [good, *({**good, **change} for change in bad), good])
    task = MMLU("test", tmp_path)
    assert len(task) == 2 and task.skipped == len(bad)
    lines = capsys.readouterr().out.splitlines()
    assert "mmlu/test.parquet, row 1: no answer" in lines[0] and "row 2: choices must be" in lines[1]
    assert lines[-1].endswith("mmlu/test.parquet: skipped 6 of 8 conversations") and len(lines) == 6
    assert [conversation["messages"][1]["content"] for conversation in task] == ["B", "B"]


def test_bad_rows_of_every_kind(tmp_path):
    arc = {"question": "Q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    arcs = [arc, {**arc, "answerKey": "3"}, {**arc, "answerKey": None}, {**arc, "choices": None}]
    arcs += [
        {**arc, "choices": {"text": ["x"], "label": ["1", "2"]}},
        {**arc, "choices": {"text": None, "label": None}},
    ]
    write_rows(tmp_path / "arc_easy" / "test.parquet", arcs)
    gsm = {"question": "Q", "answer": "so <<1+1=2>>2\n#### 2"}
    write_rows(tmp_path / "gsm8k" / "test.parquet", [gsm, {**gsm, "answer": "2"}, {**gsm, "answer": "#### two"}])
    for task, total in ((ARCEasy("test", tmp_path), 6), (GSM8K("test", tmp_path), 3)):
        assert len(task) == 1 and task.skipped == total - 1
        assert task.evaluate(task[0], said(task[0]))


def test_an_empty_file_is_an_empty_task_and_a_wrong_one_is_named(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "gsm8k" / "test.parquet"
    write_rows(path, [{"question": "Q", "answer": "#### 2"}])
    parquet.write_table(parquet.read_table(path).slice(0, 0), path)
    assert len(GSM8K("test", tmp_path)) == 0
    parquet.write_table(pa.table({"question": ["Q"]}), path)
    with pytest.raises(ValueError, match=r"test\.parquet is not a Parquet file with question and answer"):
        GSM8K("test", tmp_path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"test\.parquet is not a Parquet file"):
        GSM8K("test", tmp_path)
    with pytest.raises(ValueError, match="unknown split 'val'"):
        GSM8K("val", tmp_path)
    with pytest.raises(ValueError, match=r"train\.parquet is missing.*--tasks-dir"):
        GSM8K("train", tmp_path)


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def gsm8k_hub(tmp_path, monkeypatch):
    """A hub with GSM8K's test split in three shards, and an empty base directory."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    with HubServer("openai/gsm8k") as server:
        for i in (2, 0, 1):
            rows = [{"question": f"{i} {j}", "answer": f"#### {i}{j}", "more": os.urandom(50_000)} for j in range(4)]
            data = write_rows(tmp_path / "made" / f"{i}.parquet", rows)
            server.files[f"main/test-0000{i}-of-00003.parquet"] = data
        server.files["socratic/test-00000-of-00001.parquet"] = server.files["main/train-00000-of-00001.parquet"] = data
        server.files["README.md"] = b"# GSM8K"
        server.use(monkeypatch, tmp_path / "cache")
        yield server


def downloads(server) -> list[str]:
    return [path for path, _ in server.requests if path.endswith(".parquet")]


def test_a_split_is_fetched_once_with_its_manifest(gsm8k_hub, tmp_path):
    assert GSM8K.local("test") == []
    for _ in range(2):
        task = GSM8K("test")
        assert [c["messages"][0]["content"] for c in task] == [f"{i} {j}" for i in range(3) for j in range(4)]
    assert sorted(downloads(gsm8k_hub)) == [f"main/test-0000{i}-of-00003.parquet" for i in range(3)]
    folder = tmp_path / "base" / "tasks" / "gsm8k"
    manifest = json.loads((folder / "test.manifest.json").read_text())
    assert manifest["licence"] == "MIT" and manifest["source"].endswith("/datasets/openai/gsm8k")
    assert [len(gsm8k_hub.files[entry["file"]]) for entry in manifest["files"]] == [
        e["bytes"] for e in manifest["files"]
    ]
    assert check_records(tmp_path / "base") == {"tasks/NAME/SPLIT.manifest.json"}
    assert GSM8K("test", tasks_dir=tmp_path / "base" / "tasks")[0] == task[0]  # a download is a folder of tasks too
    path = folder / "main" / "test-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    with pytest.raises(ValueError, match=r"test-00001-of-00003\.parquet is not the file that was downloaded: delete"):
        GSM8K("test")


def test_one_process_fetches_and_the_others_wait(gsm8k_hub):
    gsm8k_hub.faults["main/test-00001-of-00003.parquet"] = [("stall", 0.3, 10)]
    lengths: list[int] = []
    threads = [threading.Thread(target=lambda: lengths.append(len(GSM8K("test")))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == [12] * 4 and len(downloads(gsm8k_hub)) == 3


def test_a_killed_download_leaves_no_manifest_and_is_continued(gsm8k_hub, tmp_path):
    gsm8k_hub.faults["main/test-00002-of-00003.parquet"] = [("stall", 60.0, 100_000)]
    code = "from tasks.gsm8k import GSM8K; GSM8K('test')"
    environment = {**os.environ, "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 60
    while len(downloads(gsm8k_hub)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    process.kill()
    process.wait()
    assert GSM8K.local("test") == []
    assert not (tmp_path / "base/tasks/gsm8k/main/test-00002-of-00003.parquet").exists()
    before = len(downloads(gsm8k_hub))
    assert len(GSM8K("test")) == 12
    assert downloads(gsm8k_hub)[before:] == ["main/test-00002-of-00003.parquet"], "what had arrived is kept"


def test_a_hub_that_has_not_got_it_or_is_not_there(gsm8k_hub, tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat.hub.time.sleep", lambda seconds: None)
    del gsm8k_hub.files["main/test-00001-of-00003.parquet"]
    with pytest.raises(ValueError, match=r"HF_ENDPOINT.*--tasks-dir .*lists 2 files"):
        GSM8K("test")
    with pytest.raises(ValueError, match=r"--tasks-dir .*404"):
        MMLU("test")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"gsm8k/test\.parquet by --tasks-dir") as caught:
        GSM8K("test")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "base").rglob("*.json"))
    with pytest.raises(ValueError, match="is missing: put it there"):
        GSM8K("test", tasks_dir=tmp_path)  # nothing is ever downloaded into a folder of yours


# --- your own file ---------------------------------------------------------------------------------------------------

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def test_custom_lines_are_read_and_bad_ones_named(tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    bad = [
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"message": 1}',
        b'[{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi"}]',
        b'[{"role": "assistant", "content": "Hi"}]',
        b'[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]',
        b'[{"role": "user", "content": "\xff"}, {"role": "assistant", "content": "x"}]',
        b'[{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]',
        b"[" * 100_000,
        b"\x00\x01",
    ]
    good = json.dumps(GOOD).encode()
    lines = [b"\xef\xbb\xbf" + good, b"", *bad, json.dumps(GOOD["messages"]).encode() + b"\r"]
    path.write_bytes(b"\n".join(lines))
    task = CustomJSON(path)
    assert len(task) == 2 and task.skipped == len(bad) and task[0] == task[1] == GOOD
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in out[:5]] == [f"{path}:{n}" for n in range(3, 8)]
    assert out[5:] == [f"{path}: skipped {len(bad)} of {len(bad) + 2} conversations"]
    validate(task[0])


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{}\n[]\n", b"PAR1\x00"])
def test_a_file_without_any_conversation_is_an_error(tmp_path, content):
    (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"mine\.jsonl holds no conversation"):
        CustomJSON(tmp_path / "mine.jsonl")
    with pytest.raises(FileNotFoundError):
        CustomJSON(tmp_path / "other.jsonl")


# --- mixtures --------------------------------------------------------------------------------------------------------


def texts(task) -> Counter:
    return Counter(json.dumps(task[i]["messages"]) for i in range(len(task)))


@pytest.fixture
def no_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))


def test_without_published_tasks_the_skills_stay_as_they_are(no_downloads, tmp_path):
    skills = mixture("train", 0.02, 0, identity=True)
    assert all(mixtures.join(stage, skills, 0) is skills for stage in ("mid", "sft", "val"))
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"--tasks-dir .* holds none of smoltalk/train\.parquet"):
            mixtures.join("mid", skills, 0, folder)


@needs_real_rows
def test_stages_train_on_training_splits_alone(no_downloads, tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps(GOOD) + "\n")
    skills = mixture("train", 0.02, 0, identity=False)
    own = texts(CustomJSON(tmp_path / "mine.jsonl"))
    mid, sft = (texts(mixtures.join(stage, skills, 0, REAL, tmp_path / "mine.jsonl")) for stage in ("mid", "sft"))
    parts = {task: texts(task("train", REAL)) for task in (SmolTalk, GSM8K, ARCEasy, ARCChallenge)}
    assert mid == texts(skills) + own + parts[SmolTalk] + texts(MMLU("dev", REAL)) + parts[GSM8K]
    rest = sft - texts(skills) - own - parts[GSM8K] - parts[ARCEasy] - parts[ARCChallenge]
    assert rest.total() == 10_000 and rest <= parts[SmolTalk]
    scored = set().union(*(texts(task("test", REAL)) for task in public.SCORED.values() if task is not HumanEval))
    for name in ("mid", "sft"):
        assert not {(task, split) for task, split, _ in mixtures.PUBLISHED[name]} & {(t, "test") for t in parts}
    # ARC-Easy as published has one question in both of its splits
    assert len((mid.keys() | sft.keys()) & scored) <= 1


def test_downloaded_tasks_join_by_themselves(gsm8k_hub, capsys):
    skills = mixture("train", 0.02, 0, identity=False)
    assert mixtures.join("mid", skills, 0) is skills and not downloads(gsm8k_hub)
    GSM8K.fetch("train")
    mixed = mixtures.join("mid", skills, 0)
    assert len(mixed) == len(skills) + 4 and isinstance(mixed, TaskMixture)
    assert f"mid conversations: {len(skills)} of the built-in skills, 4 of gsm8k" in capsys.readouterr().out


def test_a_stage_trains_on_both_and_names_a_bad_line(trained_world, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join([json.dumps(GOOD)] * 3 + ["{"]))
    write_rows(tmp_path / "tasks" / "gsm8k" / "train.parquet", [{"question": "1 + 1?", "answer": "#### 2"}] * 5)
    flags = [*tiny_run.STEPS, *tiny_run.SKILLS, "--num-iterations", "2", "--tasks-dir", str(tmp_path / "tasks")]
    out = tiny_run.run("scripts.chat_sft", *flags, "--custom-json", str(path)).out
    assert f"{path}:4: " in out and f"{path}: skipped 1 of 4 conversations" in out
    assert re.search(rf"sft conversations: \d+ of the built-in skills, 5 of gsm8k, 3 of {path}\n", out)
    assert "/none.jsonl" in tiny_run.script("scripts.mid_train", *flags, "--custom-json", "/none.jsonl").error_line


def test_every_published_task_says_where_it_is_from():
    for task in [*public.SCORED.values(), SmolTalk]:
        assert issubclass(task, ParquetTask) and task.repo.count("/") == 1 and task.config and task.licence
