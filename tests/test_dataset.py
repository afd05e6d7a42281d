"""Datasets from folders, from the built-in world and from a hub; what is validation stays validation."""

import gzip
import hashlib
import io
import json
import os
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hub_server import HubServer
from pyarrow import parquet

from nanochat import cli, dataset, world
from nanochat.dataset import prepare
from nanochat.documents import REMOTES, Remote, dataset_dir, iterate_documents, list_shards, read_manifest

CASES = Path(__file__).parents[2] / "shared" / "cases" / "files"  # small inputs that once failed elsewhere
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="no ../shared/cases here")
TEXTS = [f"Document number {i} says hello to document {i + 1}.\n" for i in range(200)]


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my texts").mkdir()
    return tmp_path / "my texts"


def parquet_bytes(texts, name="text", kind=None):
    sink = io.BytesIO()
    parquet.write_table(pa.table({name: pa.array(texts, kind or pa.string())}), sink)
    return sink.getvalue()


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def documents(name, split):
    return list(iterate_documents(list_shards(name, split)))


# --- folders


def write_file(path, texts):
    """Write texts in the format that the name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.lower()
    if name.endswith(".parquet"):
        path.write_bytes(parquet_bytes(texts))
        return
    as_json = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    data = (as_json if ".jsonl" in name.lower() else "".join(texts)).encode()
    if name.lower().endswith(".gz"):
        data = gzip.compress(data)
    if name.lower().endswith(".zst"):
        data = pa.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(data)


LAYOUTS = [
    {"train": ["train.jsonl"], "val": ["validation.jsonl"], "test": ["test.jsonl"]},
    {"train": ["train.txt"], "val": ["val.txt"]},
    {"train": ["TRAIN.Parquet"], "val": ["Dev.JSONL"], "test": ["Test.TXT"]},
    {"train": ["a.jsonl", "z.jsonl"], "val": ["dev.txt"]},
    {
        "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        "val": ["data/validation-00000-of-00001.parquet"],
        "test": ["data/test-00000-of-00001.parquet"],
    },
    {"train": ["train/0.parquet", "train/1.parquet"], "val": ["valid/0.parquet"], "test": ["test/0.parquet"]},
    {"train": ["en/partial-train/0000.parquet"], "val": ["en/validation/0000.parquet"], "test": ["en/test/0.parquet"]},
    {"train": ["c4-train.00000-of-01024.jsonl.gz"], "val": ["c4-validation.00000-of-00008.jsonl.gz"]},
    {"train": ["train/00.jsonl.zst"], "val": ["val.jsonl.zst"], "test": ["test.txt.gz"]},
    {"train": ["TRAIN.TXT.GZ", "B.JSONL.ZST"], "val": ["VAL.JSONL.GZ"], "test": ["TEST.TXT.ZST"]},
    {"train": ["trainset.jsonl"], "val": ["devset.txt"], "test": ["testset.jsonl", "tests/unittest.txt"]},
    {"train": ["Stories-V2-train.txt"], "val": ["Stories-V2-valid.txt"], "test": ["Stories_test_1.txt"]},
    {"train": ["training/dev-tools.jsonl"], "val": ["eval/train-or-bus.txt"], "test": ["testing/validation.txt"]},
    {"train": ["contest.jsonl", "latest.txt", "devotion.txt", "training.txt", "interval.txt"], "val": ["val1.txt"]},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout["val"][0])
def test_names_of_files_and_folders_give_their_roles(folder, capsys, layout):
    wanted = {"train": [], "val": [], "test": []}
    for role, names in layout.items():
        for name in names:
            texts = [f"{name}, document {i}: it is here to {role} with.\n" for i in range(9)]
            write_file(folder / name, texts)
            wanted[role] += ["".join(texts)] if ".txt" in name.lower() else texts
    manifest = prepare(str(folder))
    assert sorted(documents("my-texts", "train")) == sorted(wanted["train"])
    assert sorted(documents(str(folder), "val")) == sorted(wanted["val"]), "the path is as good as the name"
    out = capsys.readouterr().out
    assert all(name in out for name in layout.get("test", [])), "what is left out is said to be"
    sources = {entry["file"]: entry["sha256"] for entry in manifest["sources"]}
    used = [name for role in ("train", "val") for name in layout[role]]
    assert sources == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in used}


@needs_cases
def test_training_and_test_files_alone_are_split_by_hash(capsys):
    """Four fifths of a data set in Hugging Face's layout train and validate; the test file does neither."""
    prepare(str(CASES / "hf_layout_test"))
    train, val = documents("hf_layout_test", "train"), documents("hf_layout_test", "val")
    texts = parquet.read_table(CASES / "hf_layout_test" / "data" / "train-00000-of-00001.parquet")["text"].to_pylist()
    assert sorted(train + val) == sorted(texts)
    assert 1 <= len(val) <= 20
    assert "test-00000-of-00001.parquet" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "txt"])
def test_the_split_does_not_depend_on_files(folder, tmp_path, kind):
    """The same documents validate, whichever files they are in, and in whatever order."""
    if kind == "txt":
        for i, text in enumerate(reversed(TEXTS)):
            write_file(folder / f"{i}.txt", [text])
    else:
        for i in range(4):
            write_file(folder / f"part_{i}.{kind}", TEXTS[i::4])
    write_jsonl(tmp_path / "all.jsonl", TEXTS)
    (tmp_path / "one").mkdir()
    write_jsonl(tmp_path / "one" / "all.jsonl", TEXTS)
    prepare(str(folder))
    prepare(str(tmp_path / "one"))
    for split in ("train", "val"):
        assert sorted(documents("my-texts", split)) == sorted(documents("one", split))


def test_a_validation_file_without_text_leaves_the_split_to_hashes(folder, capsys):
    write_jsonl(folder / "train.jsonl", TEXTS)
    (folder / "validation.jsonl").write_text("")
    prepare(str(folder))
    assert sorted(documents("my-texts", "train") + documents("my-texts", "val")) == sorted(TEXTS)
    out = capsys.readouterr().out
    assert "validation.jsonl: it is empty" in out and "by its hash" in out


def test_what_is_no_text_file_is_said_to_be_left_out(folder, capsys):
    write_jsonl(folder / "train.jsonl", TEXTS)
    (folder / "README.md").write_text("It is about numbers.")
    (folder / "more.csv").write_text("text\nnumbers\n")
    prepare(str(folder))
    assert "README.md, more.csv" in capsys.readouterr().out


def test_only_test_files(folder):
    write_jsonl(folder / "test.jsonl", TEXTS)
    with pytest.raises(ValueError, match="no text for training"):
        prepare(str(folder))


def test_manifest_names_every_shard(folder):
    write_jsonl(folder / "all.jsonl", TEXTS)
    manifest = prepare(str(folder))
    for path in list_shards("my-texts", "train") + list_shards("my-texts", "val"):
        entry = next(entry for entry in manifest["shards"] if entry["file"] == path.name)
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert entry["bytes"] == path.stat().st_size
        assert entry["documents"] == parquet.read_metadata(path).num_rows
    assert manifest["licence"] and manifest["source"] == str(folder)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_documents_are_split_by_hash(folder, kind):
    if kind == "txt":
        for i, text in enumerate(TEXTS):
            (folder / f"{i:03d}.txt").write_text(text)
    else:
        write_jsonl(folder / "all.jsonl", TEXTS + TEXTS[:50])
    prepare(str(folder))
    train, val = documents("my-texts", "train"), documents("my-texts", "val")
    assert sorted(set(train + val)) == sorted(TEXTS)
    assert not set(train) & set(val), "a text that occurs twice is on one side"
    assert 2 <= len(set(val)) <= 25  # 200 / 20, give or take three standard deviations


@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_documents_leave_one_on_each_side(folder, count):
    for text in TEXTS[:count]:
        (folder / f"{hash(text)}.txt").write_text(text)
    prepare(str(folder))
    assert documents("my-texts", "train") and documents("my-texts", "val")


def test_a_single_book_gives_its_last_twentieth(folder):
    (folder / "book.txt").write_text("".join(TEXTS))
    prepare(str(folder))
    train, val = documents("my-texts", "train"), documents("my-texts", "val")
    assert "".join(train + val) == "".join(TEXTS)
    assert 0.03 < len("".join(val)) / len("".join(TEXTS)) < 0.07
    assert train[0].endswith("\n"), "cut between lines"


def test_n_limits_and_grows(folder, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD_BYTES", sum(map(len, TEXTS)) // 5)
    for i in range(4):
        write_jsonl(folder / f"{i}.jsonl", TEXTS[50 * i : 50 * i + 50])
    prepare(str(folder), 1)
    val = list_shards("my-texts", "val")[0].read_bytes()
    some = documents("my-texts", "train")
    prepare(str(folder), 3)
    more = documents("my-texts", "train")
    assert len(list_shards("my-texts", "train")) == 3
    assert more[: len(some)] == some and len(some) < len(more) < 0.8 * len(TEXTS)
    prepare(str(folder))
    assert sorted(documents("my-texts", "train") + documents("my-texts", "val")) == sorted(TEXTS)
    assert list_shards("my-texts", "val")[0].read_bytes() == val


def test_much_validation_text_is_several_shards(folder, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD_BYTES", 1000)
    write_jsonl(folder / "train.jsonl", TEXTS[:9])
    write_jsonl(folder / "val.jsonl", TEXTS[9:])
    prepare(str(folder))
    assert len(list_shards("my-texts", "val")) > 3
    assert documents("my-texts", "val") == TEXTS[9:]


def test_preparing_again_changes_nothing_until_the_folder_does(folder):
    write_jsonl(folder / "all.jsonl", TEXTS)
    assert prepare(str(folder)) == prepare(str(folder))
    write_jsonl(folder / "all.jsonl", TEXTS[1:])
    with pytest.raises(ValueError, match=r"changed since it was prepared \(all.jsonl\): delete"):
        prepare(str(folder))


def test_two_folders_of_one_name(folder, tmp_path):
    write_jsonl(folder / "all.jsonl", TEXTS)
    prepare(str(folder))
    other = tmp_path / "elsewhere" / folder.name
    other.mkdir(parents=True)
    write_jsonl(other / "all.jsonl", TEXTS)
    with pytest.raises(ValueError, match="rename"):
        prepare(str(other))


def test_folder_named_like_a_known_dataset(tmp_path):
    (tmp_path / "climbmix").mkdir()
    write_jsonl(tmp_path / "climbmix" / "all.jsonl", TEXTS)
    assert prepare(str(tmp_path / "climbmix"))["name"] == "climbmix-folder"


@pytest.mark.parametrize("change", ["missing", "changed", "replaced"])
def test_validation_shard_is_fixed(folder, change):
    write_jsonl(folder / "all.jsonl", TEXTS)
    prepare(str(folder))
    path = list_shards("my-texts", "val")[0]
    if change == "missing":
        path.unlink()
    elif change == "changed":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    else:
        path.write_bytes(list_shards("my-texts", "train")[0].read_bytes())
    with pytest.raises(ValueError, match=r"shard_val\.parquet"):
        list_shards("my-texts", "val")


def test_missing_training_shard(folder):
    write_jsonl(folder / "all.jsonl", TEXTS)
    prepare(str(folder))
    list_shards("my-texts", "train")[0].unlink()
    with pytest.raises(ValueError, match=r"shard_00000\.parquet.* is missing: run"):
        list_shards("my-texts", "train")
    prepare(str(folder))
    assert documents("my-texts", "train")


# --- documents that are not as they should be


def test_surrogates_nuls_and_empty_documents_are_mended_and_counted(folder, capsys):
    bad = ["a\ud800b", "nul\0l", "", " \n", "\0"]
    write_jsonl(folder / "all.jsonl", [*TEXTS, *bad])
    manifest = prepare(str(folder))
    texts = documents("my-texts", "train") + documents("my-texts", "val")
    assert sorted(texts) == sorted([*TEXTS, "a\ufffdb", "null"])
    assert manifest["counts"] == {"skipped": 3, "cleaned": 2}
    assert "skipped: 3, cleaned: 2" in capsys.readouterr().out


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}\n\n{"text": "tea"}\n')
    raw = pa.Array.from_buffers(pa.string(), 2, pa.array([b"caf\xe9", b"tea"], pa.binary()).buffers())
    parquet.write_table(pa.table({"text": raw}), tmp_path / "c.parquet")
    counts = Counter()
    found = list(iterate_documents([tmp_path / name for name in ("a.txt", "b.jsonl", "c.parquet")], counts))
    assert found == ["caf\ufffd au lait", "caf\ufffd", "tea", "caf\ufffd", "tea"]
    assert counts["cleaned"] == 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be", "utf-32-be"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_encodings_and_line_ends(tmp_path, encoding, newline):
    """Files of Windows: Notepad's "Unicode" is UTF-16 with a byte order mark. A mark says the order where none is."""
    mark = "\ufeff" if encoding.endswith("-be") else ""
    lines = ["naïve café\n", "日本語 and 😀\n", "end"]
    as_json = [json.dumps({"text": line}, ensure_ascii=False) + newline for line in lines]
    (tmp_path / "a.txt").write_bytes((mark + "".join(lines).replace("\n", newline)).encode(encoding))
    (tmp_path / "b.jsonl").write_bytes((mark + "".join(as_json)).encode(encoding))
    counts = Counter()
    assert list(iterate_documents([tmp_path / "a.txt"], counts)) == ["".join(lines)]
    assert list(iterate_documents([tmp_path / "b.jsonl"], counts)) == lines
    assert not counts


KINDS = [
    *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(5)),
    *(pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.binary())),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_arrow_kind_of_strings_and_bytes(tmp_path, kind, capsys):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(["first", None, "thé!"], kind=kind))
    counts = Counter()
    assert list(iterate_documents([tmp_path / "a.parquet"], counts)) == ["first", "thé!"]
    assert counts == {"skipped": 1}
    assert "a.parquet, row 2" in capsys.readouterr().out


@needs_cases
@pytest.mark.parametrize(
    ("name", "n_texts", "says"),
    [
        ("jsonl_null", 200, "a.jsonl, line 51"),
        ("parquet_no_rows", 200, "a.parquet: it is empty"),
        ("parquet_string_view", 200, ""),
    ],
)
def test_cases_of_other_projects(name, n_texts, says, capsys):
    prepare(str(CASES / name))
    train, val = documents(name, "train"), documents(name, "val")
    wanted = [
        f"Document {i}: the cat number {i} sat on mat {7 * i % 13} and looked at the moon." for i in range(n_texts)
    ]
    assert sorted(train + val) == sorted(wanted)
    assert 2 <= len(val) <= 25
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '"text"', "{}", '{"text": 3}', '{"text": null}', "[" * 100_000, "9" * 5000, '{"text": "cut sh', "\x00"],
    ids=lambda line: line[:12],
)
@pytest.mark.parametrize("end", ["\n", ""])
def test_a_line_that_is_no_document_is_skipped_by_its_number(tmp_path, capsys, line, end):
    """Also at the end of the file, where a writer that was killed left it."""
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line + end)
    counts = Counter()
    assert list(iterate_documents([tmp_path / "a.jsonl"], counts)) == ["fine"]
    assert counts == {"skipped": 1}
    assert "a.jsonl, line 3: no text" in capsys.readouterr().out


def test_only_the_first_skipped_lines_are_named(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("{}\n" * 100)
    counts = Counter()
    assert list(iterate_documents([tmp_path / "a.jsonl"], counts)) == []
    assert counts == {"skipped": 100}
    assert capsys.readouterr().out.count("\n") == 5


@pytest.mark.parametrize("name", ["b.parquet", "b.jsonl", "b.txt"])
def test_an_empty_file_is_named(folder, capsys, name):
    write_jsonl(folder / "a.jsonl", TEXTS)
    (folder / name).write_bytes(b"")
    prepare(str(folder))
    assert sorted(documents("my-texts", "train") + documents("my-texts", "val")) == sorted(TEXTS)
    assert f"skipped {folder / name}" in capsys.readouterr().out


def test_parquet_without_rows_or_columns_is_empty(folder, capsys):
    """pandas writes such a file for an empty DataFrame."""
    write_jsonl(folder / "a.jsonl", TEXTS)
    parquet.write_table(pa.table({}), folder / "b.parquet")
    prepare(str(folder))
    assert sorted(documents("my-texts", "train") + documents("my-texts", "val")) == sorted(TEXTS)
    assert f"skipped {folder / 'b.parquet'}" in capsys.readouterr().out


def test_links_are_followed_once(folder, tmp_path, capsys):
    """Large folders are often on another disk, and linked to; a link may lead back to where it is in."""
    write_file(tmp_path / "disk" / "a.jsonl", TEXTS)
    try:
        (folder / "linked").symlink_to(tmp_path / "disk")
        (tmp_path / "disk" / "back").symlink_to(folder)
        (folder / "gone.jsonl").symlink_to(tmp_path / "nothing.jsonl")
    except OSError:
        pytest.skip("this system makes no links")
    prepare(str(folder))
    assert sorted(documents("my-texts", "train") + documents("my-texts", "val")) == sorted(TEXTS)
    assert "gone.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.parquet", b"PAR1"),
        ("a.parquet", parquet_bytes(TEXTS)[:-100]),
        ("a.parquet", parquet_bytes(TEXTS)[:300]),
        ("a.parquet", b"x" * 3000),
        ("a.jsonl.gz", gzip.compress(b'{"text": "hello"}\n' * 99)[:-9]),
        ("a.txt.zst", b"x" * 3000),
    ],
    ids=["magic", "tail", "head", "noise", "gz", "zst"],
)
def test_a_broken_file(folder, name, data):
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} is damaged.*delete or replace"):
        prepare(str(folder))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_file_whose_name_is_not_utf8_is_named(folder):
    Path(folder, os.fsdecode(b"\xff.txt")).write_text("text", encoding="utf-8")
    with pytest.raises(ValueError, match=r"udcff\.txt.*rename"):
        prepare(str(folder))


def test_parquet_without_text(folder):
    (folder / "a.parquet").write_bytes(parquet_bytes(TEXTS, name="content"))
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text' of strings \(it has content\)"):
        prepare(str(folder))
    twice = pa.Table.from_arrays([pa.array(TEXTS), pa.array(TEXTS)], names=["text", "text"])
    parquet.write_table(twice, folder / "a.parquet")
    with pytest.raises(ValueError, match=r"it has text, text"):
        prepare(str(folder))
    for kind, value in ((pa.int64(), 1), (pa.list_(pa.string()), ["a"]), (pa.bool_(), True)):
        (folder / "a.parquet").write_bytes(parquet_bytes([value], kind=kind))
        with pytest.raises(ValueError, match="no column 'text' of strings"):
            prepare(str(folder))


def test_folders_without_text(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no \.parquet, \.jsonl or \.txt file"):
        prepare(str(folder))
    (folder / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="no text for training: add documents"):
        prepare(str(folder))
    (folder / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="add documents"):
        prepare(str(folder))
    with pytest.raises(ValueError, match="no such folder"):
        prepare(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"not prepared: run python -m nanochat\.dataset --name climbmix"):
        read_manifest("climbmix")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--name", "nowhere"], "no such folder"),
        (["-n", "0"], "--shards 0: must be above 0"),
        (["--workers", "0"], "--workers"),
        (["-n", "x"], "invalid int"),
        (["--name", "climbmix", "-n", "6543"], "6542 training shards"),
    ],
)
def test_command_line_mistakes_are_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dataset", *flags])
    with pytest.raises(SystemExit) as ended:
        cli.run(dataset.main)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error and error.count("\n") == 1


# --- the built-in world


def test_builtin_is_deterministic_and_sides_share_no_text(tmp_path, monkeypatch):
    prose = world.prose_documents()
    monkeypatch.setattr(world, "prose_documents", lambda: prose)  # it takes seconds
    first = prepare("builtin", 2, seed=3)
    train, val = documents("builtin", "train"), documents("builtin", "val")
    assert not set(train) & set(val)
    assert 0.02 < len(val) / len(train + val) < 0.1
    assert any("capital of" in text for text in train) and any("Python" in text for text in train)
    assert "PSF" in first["licence"] and "MIT" in first["licence"]
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "again"))
    assert prepare("builtin", 2, seed=3)["shards"] == first["shards"]
    assert prepare("builtin", 2, seed=4)["shards"] != first["shards"]


# --- a hub


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setitem(REMOTES, "tiny", Remote("me/tiny", 5, "CC0-1.0"))
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "cache")
        for i in range(5):
            server.files[f"shard_{i:05d}.parquet"] = parquet_bytes(TEXTS[40 * i : 40 * i + 40])
        yield server


def test_remote_dataset_downloads_grows_and_names_its_validation(server, capsys):
    prepare("tiny", 2)
    assert "CC0-1.0" in capsys.readouterr().out
    assert documents("tiny", "train") == TEXTS[:80]
    assert documents("tiny", "val") == TEXTS[160:]
    manifest = prepare("tiny", 4)
    assert manifest["complete"] and [entry["documents"] for entry in manifest["shards"]] == [40] * 5
    for entry in manifest["shards"]:
        assert entry["sha256"] == hashlib.sha256(server.files[entry["file"]]).hexdigest()
    fetched = Counter(path for path, _ in server.requests if path.endswith(".parquet"))
    assert set(fetched.values()) == {1}, "nothing is fetched twice"
    assert len(prepare("tiny", 1)["shards"]) == 5, "a dataset only grows"


def test_mirror_by_flag(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert prepare("tiny", 1, mirror=server.url)["source"].startswith(server.url)
    assert documents("tiny", "train") == TEXTS[:40]


def test_validation_comes_first_and_a_broken_download_continues(server):
    server.faults["shard_00001.parquet"] = [("status", 403)]
    with pytest.raises(ValueError, match="403"):
        prepare("tiny", 3, workers=1)
    manifest = read_manifest("tiny")
    assert not manifest["complete"]
    assert [entry["split"] for entry in manifest["shards"]] == ["train"] * 3 + ["val"], "all that will come are named"
    assert documents("tiny", "val") == TEXTS[160:], "training may start"
    with pytest.raises(ValueError, match=r"shard_00001\.parquet is not there"):
        documents("tiny", "train")
    prepare("tiny", 3)
    assert documents("tiny", "train") == TEXTS[:120]


def test_transfer_that_breaks_off_or_stalls_is_continued(server):
    server.faults["shard_00000.parquet"] = [("truncate", 100), ("stall", 3.0, 50), ("status", 503)]
    prepare("tiny", 1)
    assert documents("tiny", "train") == TEXTS[:40]


def test_bytes_that_are_not_the_listed_ones_are_not_kept(server):
    size = len(server.files["shard_00000.parquet"])
    server.faults["shard_00000.parquet"] = [("body", b"x" * size)]
    with pytest.raises(ConnectionError, match="damaged"):
        prepare("tiny", 1)
    assert not (dataset_dir("tiny") / "shard_00000.parquet").exists()
    prepare("tiny", 1)
    assert documents("tiny", "train") == TEXTS[:40]


def test_hub_that_changed_its_data_is_refused(server):
    prepare("tiny", 1)
    server.files["shard_00004.parquet"] = parquet_bytes(TEXTS[:3])
    with pytest.raises(ValueError, match=r"shard_00004\.parquet of tiny has changed"):
        prepare("tiny", 2)
