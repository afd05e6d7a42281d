"""Datasets from folders, from the built-in world and from a hub; what is validation stays validation."""

import hashlib
import io
import json
import sys
from collections import Counter

import pyarrow as pa
import pytest
from hub_server import HubServer
from pyarrow import parquet

from nanochat import cli, dataset, world
from nanochat.dataset import prepare
from nanochat.documents import REMOTES, Remote, dataset_dir, iterate_documents, list_shards, read_manifest

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


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_last_of_several_shards_validates(folder, kind):
    for i in range(4):
        part = TEXTS[50 * i : 50 * i + 50]
        if kind == "parquet":
            (folder / f"part_{i}.parquet").write_bytes(parquet_bytes(part))
        else:
            write_jsonl(folder / f"part_{i}.jsonl", part)
    manifest = prepare(str(folder))
    assert manifest["name"] == "my-texts"
    assert documents("my-texts", "train") == TEXTS[:150]
    assert documents(str(folder), "val") == TEXTS[150:], "the path is as good as the name"
    assert len(list_shards("my-texts", "train")) == 3
    sources = {entry["file"]: entry["sha256"] for entry in manifest["sources"]}
    assert sources == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


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


def test_n_limits_and_grows(folder):
    for i in range(4):
        write_jsonl(folder / f"{i}.jsonl", TEXTS[50 * i : 50 * i + 50])
    prepare(str(folder), 1)
    val = list_shards("my-texts", "val")[0].read_bytes()
    assert documents("my-texts", "train") == TEXTS[:50]
    prepare(str(folder), 3)
    assert documents("my-texts", "train") == TEXTS[:150]
    assert list_shards("my-texts", "val")[0].read_bytes() == val


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
    assert manifest["counts"] == {"empty": 3, "cleaned": 2}
    assert "skipped as empty: 3, cleaned: 2" in capsys.readouterr().out


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}\n\n{"text": "tea"}\n')
    raw = pa.Array.from_buffers(pa.string(), 2, pa.array([b"caf\xe9", b"tea"], pa.binary()).buffers())
    parquet.write_table(pa.table({"text": raw}), tmp_path / "c.parquet")
    counts = Counter()
    found = list(iterate_documents([tmp_path / name for name in ("a.txt", "b.jsonl", "c.parquet")], counts))
    assert found == ["caf\ufffd au lait", "caf\ufffd", "tea", "caf\ufffd", "tea"]
    assert counts["cleaned"] == 3


def test_null_rows_and_other_columns(tmp_path):
    table = pa.table({"id": [1, 2, 3], "text": ["one", None, "three"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    counts = Counter()
    assert list(iterate_documents([tmp_path / "a.parquet"], counts)) == ["one", "three"]
    assert counts["empty"] == 1


@pytest.mark.parametrize(
    "line", ["{", "[]", '"text"', "{}", '{"text": 3}', '{"text": null}', "[" * 100_000], ids=lambda line: line[:12]
)
def test_jsonl_line_that_is_no_document(folder, line):
    (folder / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2, is not a JSON object"):
        prepare(str(folder))


@pytest.mark.parametrize(
    "data",
    [b"", b"PAR1", parquet_bytes(TEXTS)[:-100], parquet_bytes(TEXTS)[:300], b"x" * 3000],
    ids=["empty", "magic", "tail", "head", "noise"],
)
def test_broken_parquet(folder, data):
    (folder / "a.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet is not a whole Parquet file") as caught:
        prepare(str(folder))
    assert "delete or replace" in str(caught.value)


def test_parquet_without_text(folder):
    (folder / "a.parquet").write_bytes(parquet_bytes(TEXTS, name="content"))
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text' of strings \(it has content\)"):
        prepare(str(folder))
    (folder / "a.parquet").write_bytes(parquet_bytes([1, 2], kind=pa.int64()))
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
