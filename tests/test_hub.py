"""Downloads against a real server on this machine, which breaks off, lies and refuses."""

import errno
import hashlib
import os
import resource
import subprocess
import sys
import threading
import time

import pytest
from hub_server import HubServer

from nanochat import hub

DATA = os.urandom(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
FAST = {"timeout": 5.0, "backoff": 0.01}


@pytest.fixture
def server():
    with HubServer() as server:
        server.files["a.bin"] = DATA
        yield server


def fetch(server, path, **options):
    return hub.download(server.file_url("a.bin"), path, **(FAST | options))


def test_whole_file_and_progress(server, tmp_path):
    counts = []
    path = fetch(server, tmp_path / "x" / "a.bin", size=len(DATA), sha256=SHA256, progress=counts.append)
    assert path.read_bytes() == DATA
    assert sum(counts) == len(DATA)
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]
    fetch(server, path, size=len(DATA))
    assert len(server.requests) == 1, "a file that is there is not fetched again"


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_passing_errors_are_retried(server, tmp_path, status):
    server.faults["a.bin"] = [("status", status)] * 3
    assert fetch(server, tmp_path / "a.bin").read_bytes() == DATA
    assert len(server.requests) == 4


@pytest.mark.parametrize("status", [401, 403, 404])
def test_lasting_errors_fail_at_once(server, tmp_path, status):
    server.faults["a.bin"] = [("status", status)]
    with pytest.raises(ValueError, match=str(status)):
        fetch(server, tmp_path / "a.bin")
    assert len(server.requests) == 1
    assert not (tmp_path / "a.bin").exists()


def test_bad_address_is_the_users_mistake(tmp_path):
    with pytest.raises(ValueError, match="no-such-scheme"):
        hub.download("no-such-scheme/a.bin", tmp_path / "a.bin", **FAST)


def test_retries_end(server, tmp_path):
    server.faults["a.bin"] = [("status", 503)] * 10
    with pytest.raises(ConnectionError, match=r"a\.bin"):
        fetch(server, tmp_path / "a.bin", retries=2)
    assert len(server.requests) == 3
    assert not (tmp_path / "a.bin").exists()


@pytest.mark.parametrize("known", [{}, {"sha256": SHA256}, {"size": len(DATA)}])
def test_truncated_transfer_continues_where_it_broke(server, tmp_path, known):
    server.faults["a.bin"] = [("truncate", 1_000_000), ("truncate", 500_000)]
    assert fetch(server, tmp_path / "a.bin", **known).read_bytes() == DATA
    starts = [int((given or "bytes=0-")[6:-1]) for _, given in server.requests]
    assert starts[0] == 0
    assert 900_000 < starts[1] <= 1_000_000, "at most a chunk is fetched twice"
    assert 400_000 < starts[2] - starts[1] <= 500_000


def test_server_without_ranges_restarts(server, tmp_path):
    counts = []
    server.faults["a.bin"] = [("truncate", 1_000_000), ("no_range",)]
    assert fetch(server, tmp_path / "a.bin", sha256=SHA256, progress=counts.append).read_bytes() == DATA
    assert sum(counts) == len(DATA)


def test_file_that_changed_between_attempts_restarts(server, tmp_path):
    """If-Range: half of the old file and half of the new one are never joined."""
    server.faults["a.bin"] = [("truncate", 1_000_000)]
    other = os.urandom(len(DATA))
    change = threading.Event()

    def progress(count):
        if count and not change.is_set():
            change.set()
            server.files["a.bin"] = other

    assert fetch(server, tmp_path / "a.bin", progress=progress).read_bytes() == other


def test_wrong_bytes_are_thrown_away(server, tmp_path):
    wrong = bytes(len(DATA))
    server.faults["a.bin"] = [("body", wrong), ("body", DATA + b"!"), ("body", DATA[:-1])]
    assert fetch(server, tmp_path / "a.bin", size=len(DATA), sha256=SHA256).read_bytes() == DATA
    server.faults["a.bin"] = [("body", wrong)] * 9
    with pytest.raises(ConnectionError, match="SHA-256"):
        fetch(server, tmp_path / "b.bin", sha256=SHA256, retries=2)
    assert not (tmp_path / "b.bin").exists()


@pytest.mark.parametrize("part", [DATA[:7], bytes(7), DATA, bytes(len(DATA)), DATA + b"!"])
def test_partial_file_of_an_earlier_process(server, tmp_path, part):
    (tmp_path / "a.bin.part").write_bytes(part)
    assert fetch(server, tmp_path / "a.bin", size=len(DATA), sha256=SHA256).read_bytes() == DATA
    (tmp_path / "b.bin.part").write_bytes(part)
    assert fetch(server, tmp_path / "b.bin").read_bytes() == DATA, "without a hash nothing vouches for the part"


def test_stalled_server_times_out_and_is_retried(server, tmp_path):
    server.faults["a.bin"] = [("stall", 3.0, 1000)]
    began = time.monotonic()
    assert fetch(server, tmp_path / "a.bin", timeout=0.3).read_bytes() == DATA
    assert time.monotonic() - began < 2.5


def test_killed_download_leaves_no_file_and_is_continued(server, tmp_path):
    server.faults["a.bin"] = [("stall", 60.0, 2_000_000)]
    code = f"from nanochat import hub; hub.download({server.file_url('a.bin')!r}, 'a.bin', sha256={SHA256!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    part = tmp_path / "a.bin.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "a.bin").exists()
    arrived = part.stat().st_size
    assert 0 < arrived < len(DATA)
    assert fetch(server, tmp_path / "a.bin", sha256=SHA256).read_bytes() == DATA
    assert server.requests[-1] == ("a.bin", f"bytes={arrived}-")


def test_two_downloads_of_one_file_take_turns(server, tmp_path):
    server.faults["a.bin"] = [("stall", 0.3, 1000)]
    threads = [threading.Thread(target=fetch, args=(server, tmp_path / "a.bin")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert len(server.requests) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_disk_without_room_is_named(server, tmp_path):
    """A limit on file sizes stands in for a full disk: the same failing write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(OSError, match=r"a\.bin\.part") as caught:
            fetch(server, tmp_path / "a.bin", sha256=SHA256)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert len(server.requests) == 1, "no retry mends this"
    assert fetch(server, tmp_path / "a.bin", sha256=SHA256).read_bytes() == DATA


def test_listing_pages_and_download_many(server, tmp_path):
    server.files |= {f"data/{i}.bin": os.urandom(100_000 + i) for i in range(6)}
    files = hub.list_dataset_files("me/tiny", server.url, **FAST)
    assert {file.path: (file.size, file.sha256) for file in files} == {
        path: (len(data), hashlib.sha256(data).hexdigest()) for path, data in server.files.items()
    }
    server.faults["data/3.bin"] = [("status", 503), ("truncate", 10)]
    for path in hub.download_many(files, tmp_path, workers=3, **FAST):
        assert path.read_bytes() == server.files[path.relative_to(tmp_path).as_posix()]


def test_hub_address_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("NANOCHAT_HUB", server.url + "/")
    assert [file.path for file in hub.list_dataset_files("me/tiny", **FAST)] == ["a.bin"]
    assert hub.base_url("http://other/") == "http://other"


def test_unknown_repository(server):
    with pytest.raises(ValueError, match="404"):
        hub.list_dataset_files("me/other", server.url, **FAST)


def test_one_dead_link_stops_the_others_and_what_arrived_stays(server, tmp_path):
    files = [hub.RemoteFile(name, server.file_url(name)) for name in ("a.bin", "gone.bin", "a.bin")]
    with pytest.raises(ValueError, match=r"gone\.bin"):
        hub.download_many(files, tmp_path, workers=1, **FAST)
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert not (tmp_path / "gone.bin").exists()
