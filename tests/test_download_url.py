"""`download_url`: a plain address (the CORE bundle's) on a server that breaks off, stalls and refuses."""

import os

import pytest
from hub_server import HubServer

from nanochat.hub import download_url

DATA = os.urandom(3_000_000)


@pytest.fixture
def server():
    with HubServer() as server:
        server.files["a.bin"] = DATA
        yield server


def fetch(server, path, **options):
    download_url(server.file_url("a.bin"), path, pause=0.01, timeout=0.5, **options)
    return path


@pytest.mark.parametrize(
    "faults",
    [
        [],
        [("status", 503), ("status", 429), ("status", 408)],
        [("truncate", 2_000_000), ("truncate", 500_000)],
        [("truncate", 2_000_000), ("no_range",)],
        [("stall", 2.0, 1000)],
    ],
    ids=["sound", "refuses", "breaks off", "will not continue", "stalls"],
)
def test_whole_file_whatever_the_server_does(server, tmp_path, faults):
    server.faults["a.bin"] = list(faults)
    assert fetch(server, tmp_path / "x" / "a.bin").read_bytes() == DATA
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a.bin"]
    assert len(server.requests) == len(faults) + (faults[-1:] != [("no_range",)])


def test_transfer_continues_where_it_broke(server, tmp_path):
    server.faults["a.bin"] = [("truncate", 2_000_000)]
    fetch(server, tmp_path / "a.bin")
    start = int(server.requests[1][1].removeprefix("bytes=").rstrip("-"))
    assert 0 < start <= 2_000_000


def test_two_versions_of_a_file_are_never_joined(server, tmp_path):
    """The ETag of the first answer goes along (If-Range): a server whose file has changed sends all of it."""
    other = os.urandom(len(DATA))
    server.faults["a.bin"] = [("truncate", 2_000_000)]
    server.files["a.bin"] = DATA
    original = server.answer

    def answer(request):
        original(request)
        server.files["a.bin"] = other

    server.answer = answer
    assert fetch(server, tmp_path / "a.bin").read_bytes() == other


@pytest.mark.parametrize(("status", "error"), [(401, ValueError), (404, ValueError), (500, ConnectionError)])
def test_failures_leave_nothing_behind(server, tmp_path, status, error):
    server.faults["a.bin"] = [("status", status)] * 9
    with pytest.raises(error, match=r"a\.bin.*"):
        fetch(server, tmp_path / "a.bin", attempts=3)
    assert list(tmp_path.iterdir()) == []
    assert len(server.requests) == (3 if error is ConnectionError else 1)


def test_address_without_a_scheme(tmp_path):
    with pytest.raises(ValueError, match="no-such-scheme"):
        download_url("no-such-scheme/a.bin", tmp_path / "a.bin")
