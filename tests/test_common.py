"""Small file helpers. Oracles: hashlib, json, and the file system itself under a limit that stands for a full disk."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import common

ROOT = Path(__file__).resolve().parent.parent


def test_the_base_dir_is_the_variable_or_a_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, expected in (("/some/where", Path("/some/where")), ("~/data", tmp_path / "data")):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", value)
        assert common.get_base_dir() == expected
    for unset in (lambda: monkeypatch.setenv("NANOCHAT_BASE_DIR", ""), lambda: monkeypatch.delenv("NANOCHAT_BASE_DIR")):
        unset()
        assert common.get_base_dir() == tmp_path / ".cache" / "nanochat"
    assert list(tmp_path.iterdir()) == []  # asking makes nothing


@pytest.mark.parametrize("rank, printed", [(None, "a b\n"), ("0", "a b\n"), ("1", "")])
def test_only_the_first_rank_prints(rank, printed, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    common.print0("a", "b")
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("data", [b"\x00\xff", "ünï\n", b"", b"x" * 3_000_000])
def test_atomic_write_writes_and_replaces(data, tmp_path):
    path = tmp_path / "new" / "folder" / "file.bin"
    for content in (b"old", data):
        common.atomic_write(path, content)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "meta.json"
    common.atomic_write(path, "old")
    with open(path, encoding="utf-8") as reader:
        common.atomic_write(path, "new")
        assert reader.read() == "old"  # replaced by a rename, not written over
    assert path.read_text() == "new"


def test_a_full_disk_leaves_the_old_content_and_no_rest(tmp_path):
    """A limit on file size fails the write midway, as a full disk does."""
    path = tmp_path / "meta.json"
    common.atomic_write(path, "old")
    code = (
        "import resource, sys\n"
        "from nanochat.common import atomic_write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "atomic_write(sys.argv[1], b'new' * 5000)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "OSError: [Errno 27] File too large" in result.stderr
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["meta.json"]


def test_a_kill_midway_leaves_the_old_content(tmp_path):
    path = tmp_path / "meta.json"
    common.atomic_write(path, "old")
    code = (
        "import os, sys\n"
        "from nanochat.common import atomic_write\n"
        "os.fsync = lambda fd: os.kill(os.getpid(), 9)\n"  # dies with all written but nothing renamed
        "atomic_write(sys.argv[1], b'new')\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT).returncode == -9
    assert path.read_text() == "old"


def test_json_comes_back_as_it_went(tmp_path):
    value = {"name": "é🎉", "list": [1, 2.5, None, True], "nested": {"a": {}}}
    common.atomic_write_json(tmp_path / "a.json", value)
    assert common.read_json(tmp_path / "a.json") == value
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.endswith("}\n") and "é🎉" in text and json.loads(text) == value


@pytest.mark.parametrize("damaged", [b"", b'{"a": 1', b"\xff\xfe", b"{'a': 1}"])
def test_a_damaged_json_file_is_named(damaged, tmp_path):
    path = tmp_path / "meta.json"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"meta\.json is not valid JSON .*delete it"):
        common.read_json(path)
    with pytest.raises(FileNotFoundError):
        common.read_json(tmp_path / "absent.json")


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1])
def test_sha256_of_a_file(size, tmp_path):
    data = bytes(i % 251 for i in range(size))
    (tmp_path / "file").write_bytes(data)
    assert common.sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_a_record_says_where_it_comes_from(tmp_path):
    common.write_record(tmp_path / "record.json", {"stage": "base", "val_bpb": 1.5})
    record = common.read_json(tmp_path / "record.json")
    assert (record["stage"], record["val_bpb"]) == ("base", 1.5)
    assert record["hardware"]["processor"] and record["hardware"]["cores"] > 0
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "numpy", "tiktoken", "safetensors"} <= set(record["versions"])
    assert record["commit"] and record["date"].endswith("Z")


def test_a_text_file_in_sections_and_lists(tmp_path):
    path = tmp_path / "table.txt"
    path.write_text("What this is.\n\n=== one: a\nfirst\n\nsecond \n\n=== two\n=== three\n=> x ===\n")
    assert common.read_sections(path) == {"one: a": "first\n\nsecond \n", "two": "", "three": "=> x ==="}
    path.write_text("=== names\n\nAnna\nBen\n\n=== things\napples\n")
    assert common.read_lists(path) == {"names": ["Anna", "Ben"], "things": ["apples"]}


def test_a_file_that_cannot_be_read_is_nothing(tmp_path):
    (tmp_path / "there").write_text("text\n")
    assert [common.read_if_there(tmp_path / name) for name in ("there", "gone")] == ["text\n", ""]
    assert common.read_if_there(tmp_path) == ""  # a folder
