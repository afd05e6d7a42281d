"""CORE's prompts against some written by hand, its draws against `random` by itself, and bundles that are broken."""

import io
import json
import os
import random
import zipfile
from pathlib import Path

import pytest
from core_bundle import BUNDLE, CHOICE, CLOZE, SCHEMA, needs_bundle, write_bundle
from hub_server import HubServer

from nanochat import hub
from nanochat.core_eval import (
    CoreTask,
    build_prompts,
    download_bundle,
    draw_examples,
    fingerprint,
    read_rows,
    read_tasks,
)


def core_task(kind, delimiter=" ", shots=0, path=Path("none.jsonl"), baseline=0.0):
    return CoreTask("task", path, kind, shots, delimiter, baseline)


def test_prompts_by_hand():
    another = {"query": "Grass?", "choices": ["red", "green"], "gold": 1}
    assert build_prompts(core_task("multiple_choice", "\nAnswer: "), CHOICE, [another]) == [
        "Grass?\nAnswer: green\n\nSky?\nAnswer: blue",
        "Grass?\nAnswer: green\n\nSky?\nAnswer: black",
    ]
    example = {"context_options": ["The hen", "The cow"], "continuation": "mooed.", "gold": 1}
    assert build_prompts(core_task("schema"), SCHEMA, [example]) == [
        "The cow mooed.\n\nThe cat barked.",
        "The cow mooed.\n\nThe dog barked.",
    ]
    cloze = {"context": "One and one are\n", "continuation": "two", "gold": 7}  # a field of another kind says nothing
    assert build_prompts(core_task("language_modeling"), CLOZE, [cloze]) == [
        "One and one are two\n\nTwo and two are",
        "One and one are two\n\nTwo and two are four",
    ]


def test_examples_are_other_rows_and_come_from_the_file_when_few_were_kept():
    rows = [{"id": i} for i in range(30)]
    for kept, shots in ((12, 10), (12, 1), (30, 3), (11, 10)):
        for index in range(kept):
            drawn = [row["id"] for row in draw_examples(rows, kept, index, shots)]
            assert drawn == random.Random(1234 + index).sample([i for i in range(kept) if i != index], shots)
    for index in range(5):
        few = [row["id"] for row in draw_examples(rows, 5, index, 10)]
        assert few == random.Random(1234 + index).sample([i for i in range(30) if i != index], 10)
    assert draw_examples(rows[:1], 1, 0, 10) == []


def test_rows_are_shuffled_by_the_protocols_seed(tmp_path):
    rows = [{"context": str(i), "continuation": "x"} for i in range(20)]
    bundle = write_bundle(tmp_path, {"a": ("language_modeling", 0, 0, rows)})
    random.Random(1337).shuffle(rows)
    assert read_rows(read_tasks(bundle)[0]) == (rows, [])


def test_the_fingerprint_changes_with_whatever_changes_the_questions():
    task, rows = core_task("schema"), [SCHEMA, {**SCHEMA, "gold": 0}]
    others = [
        fingerprint(task, rows, 1),
        fingerprint(task, rows[::-1], 2),
        fingerprint(task, rows[:1], 1),
        fingerprint(core_task("schema", delimiter="\n"), rows, 2),
        fingerprint(core_task("schema", shots=1), rows, 2),
        fingerprint(core_task("schema", baseline=0.5), rows, 2),
    ]
    same = fingerprint(core_task("schema", path=Path("moved.jsonl")), json.loads(json.dumps(rows)), 2)
    assert same == fingerprint(task, rows, 2) and len({same, *others}) == 7


@needs_bundle
def test_every_real_row_is_a_good_one():
    tasks = read_tasks(BUNDLE)
    assert len(tasks) == 22
    for task in tasks:
        rows, faults = read_rows(task)
        assert rows and not faults


BAD = {
    "multiple_choice": [
        {"query": "Sky?", "choices": ["blue", "black"]},
        {**CHOICE, "gold": 2},
        {**CHOICE, "gold": -1},
        {**CHOICE, "gold": True},
        {**CHOICE, "gold": "0"},
        {**CHOICE, "gold": None},
        {**CHOICE, "choices": ["blue"]},
        {**CHOICE, "choices": []},
        {**CHOICE, "choices": "blue"},
        {**CHOICE, "choices": ["blue", 7]},
        {**CHOICE, "query": ["Sky?"]},
        SCHEMA,
    ],
    "schema": [CHOICE, {**SCHEMA, "continuation": 5}, {**SCHEMA, "context_options": ["The cat"]}],
    "language_modeling": [
        {"context": "Two and two are"},
        {"context": "Two and two are", "continuation": " \n"},
        {"context": None, "continuation": "four"},
        "[1, 2]",
        '"four"',
        "nothing",
        '{"context": "Two", "continuation": ',
        "[" * 100_000,
        '{"context": ' + "9" * 10_000 + "}",
        "\x00\x01",
    ],
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_and_left_out(tmp_path, kind):
    good = {"multiple_choice": CHOICE, "schema": SCHEMA, "language_modeling": CLOZE}[kind]
    lines = [line for row in BAD[kind] for line in (row, good)]
    task = read_tasks(write_bundle(tmp_path, {"a": (kind, 0, 0, lines)}))[0]
    with open(task.path, "ab") as file:
        file.write(b'\n\n{"context": "\xff"}\r\n')
    rows, faults = read_rows(task)
    assert rows == [good] * len(BAD[kind])
    numbers = [int(fault.removeprefix(f"{task.path}:").split(":")[0]) for fault in faults]
    assert numbers == [*range(1, 2 * len(BAD[kind]), 2), 2 * len(BAD[kind]) + 3]
    assert all("\n" not in fault and len(fault) < len(str(task.path)) + 300 for fault in faults)


def test_a_file_without_a_good_row_is_an_error(tmp_path):
    shape = ("schema", 0, 50)
    bundle = write_bundle(tmp_path, {"bad": (*shape, [CHOICE] * 3), "empty": (*shape, []), "gone": (*shape, None)})
    bad, empty, gone = read_tasks(bundle)
    with pytest.raises(ValueError, match=r"3 bad rows and no good one: .*bad\.jsonl:1: 'continuation'"):
        read_rows(bad)
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        read_rows(empty)
    with pytest.raises(ValueError, match=r"gone\.jsonl is missing"):
        read_rows(gone)
    with pytest.raises(ValueError, match="unknown icl_task_type 'essay': choose from multiple_choice"):
        read_rows(core_task("essay"))


ENTRY = "{label: a, dataset_uri: a.jsonl, num_fewshot: [0], icl_task_type: schema}"


@pytest.mark.parametrize(
    ("index", "table"),
    [
        ("icl_tasks: [", None),
        ("", None),
        ("icl_tasks:", None),
        ("icl_tasks: []", None),
        ("icl_tasks: [a]", None),
        ("- a", None),
        ("icl_tasks: 5", None),
        ("icl_tasks: [{label: a}]", None),
        (f"icl_tasks: [{ENTRY}, {ENTRY}]", None),
        (f"icl_tasks: [{ENTRY.replace('[0]', '[]')}]", None),
        (f"icl_tasks: [{ENTRY.replace('[0]', '0')}]", None),
        (f"icl_tasks: [{ENTRY.replace('[0]', '[-1]')}]", None),
        (f"icl_tasks: [{ENTRY.replace('[0]', '[x]')}]", None),
        (f"icl_tasks: [{ENTRY.replace('a.jsonl', '[1]')}]", None),
        (f"icl_tasks: [{ENTRY[:-1]}, continuation_delimiter: 3}}]", None),
        ("[" * 1500, None),
        ("\x00", None),
        (None, "Eval Task,Random baseline\n"),
        (None, "Eval Task,Random baseline\na,many\n"),
        (None, "Eval Task,Random baseline\na,100\n"),
        (None, "Eval Task,Random baseline\na,nan\n"),
        (None, "a,50\n"),
        (None, ""),
    ],
)
def test_a_broken_index_is_one_error(tmp_path, index, table):
    bundle = write_bundle(tmp_path / "b", {"a": ("schema", 0, 50, [SCHEMA])})
    assert len(read_tasks(bundle)) == 1
    if index is not None:
        (bundle / "core.yaml").write_text(index)
    if table is not None:
        (bundle / "eval_meta_data.csv").write_text(table)
    with pytest.raises(ValueError, match=r"core\.yaml and eval_meta_data\.csv do not fit"):
        read_tasks(bundle)


def test_a_folder_that_is_no_bundle_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"core\.yaml is missing: --bundle"):
        read_tasks(tmp_path)


# --- download --------------------------------------------------------------------------------------------------------


def zipped(files, compression=zipfile.ZIP_DEFLATED):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


@pytest.fixture
def files(tmp_path):
    """A small bundle as the public one is laid out, with a neighbour that does not belong to it."""
    bundle = write_bundle(tmp_path / "source", {"a": ("schema", 0, 50, [SCHEMA] * 50)})
    found = {f"eval_bundle/{p.relative_to(bundle)}": p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    return {**found, "__MACOSX/._core.yaml": b"junk"}


@pytest.fixture
def server(files, monkeypatch):
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)  # between attempts
    with HubServer() as server:
        server.files["b.zip"] = zipped(files)
        yield server


def fetch(server, folder):
    download_bundle(folder, server.file_url("b.zip"))
    return folder


def test_a_bundle_is_downloaded_once(server, files, tmp_path):
    server.faults["b.zip"] = [("status", 503), ("truncate", 100)]
    folder = fetch(server, tmp_path / "x" / "bundle")
    assert len(read_rows(read_tasks(folder)[0])[0]) == 50
    there = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert {f"eval_bundle/{name}": data for name, data in there.items()} | {"__MACOSX/._core.yaml": b"junk"} == files
    asked = len(server.requests)
    fetch(server, folder)
    assert len(server.requests) == asked
    assert [p.name for p in folder.parent.iterdir()] == ["bundle"], "neither archive nor temporary folder is left"


def corrupted(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: b"<html>not a zip</html>", "zip"),
        (lambda files: zipped(files)[:-40], "zip"),
        (lambda files: corrupted(zipped({**files, "eval_bundle/big": os.urandom(100_000)}, zipfile.ZIP_STORED)), "CRC"),
        (lambda files: zipped({"a.txt": b""}), r"no core\.yaml"),
        (lambda files: zipped({**files, "eval_bundle/core.yaml": b"icl_tasks: ["}), "do not fit"),
        (lambda files: zipped({k: v for k, v in files.items() if "jsonl" not in k}), r"lacks a\.jsonl"),
        (lambda files: zipped({k: v for k, v in files.items() if "csv" not in k}), r"eval_meta_data\.csv is missing"),
    ],
)
def test_a_bad_archive_leaves_nothing_behind(server, files, tmp_path, change, message):
    server.files["b.zip"] = change(files)
    folder = tmp_path / "deep" / "x" / "bundle"
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        fetch(server, folder)
    after = sorted(p for p in tmp_path.rglob("*"))
    assert set(after) - set(before) == {folder.parent.parent, folder.parent}
    server.files["b.zip"] = zipped(files)
    assert read_tasks(fetch(server, folder))


@pytest.mark.parametrize("name", ["eval_bundle/../../escaped", "../../../escaped", "/escaped"])
def test_an_archive_writes_nothing_outside_of_its_folder(server, files, tmp_path, name):
    server.files["b.zip"] = zipped({**files, name: b"x"})
    folder = fetch(server, tmp_path / "x" / "bundle")
    assert read_tasks(folder)
    assert all(path.is_relative_to(folder) for path in tmp_path.rglob("escaped"))
    assert not Path("/escaped").exists()
