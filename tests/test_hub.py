"""`hub_errors`: whatever goes wrong in a download ends in one line with a remedy, and leaves nothing half-written.

The downloads go to a real server on this machine, which breaks off, stalls, lies and refuses.
"""

import errno
import os
import resource
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import constants, snapshot_download

from nanochat.hub import hub_errors

DATA = os.urandom(1_500_000)


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer(kind="models") as server:
        server.use(monkeypatch, tmp_path / "cache")
        server.files = {"a.bin": DATA, "config.json": b"{}"}
        yield server


def fetch(repo="me/tiny", **options):
    with hub_errors(repo):
        return snapshot_download(repo, **options)


def files_below(folder):
    return [*folder.rglob("*.bin*"), *folder.rglob("*.incomplete")]


@pytest.mark.parametrize(
    ("faults", "error", "words"),
    [
        ({"api": ("status", 401)}, ValueError, "401.*set HF_TOKEN"),
        ({"api": ("status", 404)}, ValueError, "404: check the name"),
        ({"api": ("status", 429)}, ConnectionError, "429.*wait"),
        ({"api": ("status", 500)}, ConnectionError, "500.*again"),
        ({"api": ("body", b"<html>a proxy's page</html>")}, ValueError, "HF_ENDPOINT"),
        ({"api": ("body", b'{"neither": "a hub"}')}, ValueError, "HF_ENDPOINT"),
        ({"a.bin": ("status", 403)}, ValueError, "403"),
        ({"a.bin": ("status", 503)}, ConnectionError, "503"),
        ({"a.bin": ("body", DATA[:-1])}, ConnectionError, "should be of size"),
    ],
)
def test_each_failure_is_one_line_and_the_next_run_succeeds(server, tmp_path, faults, error, words):
    for key, fault in faults.items():
        server.faults[key] = [fault]
    with pytest.raises(error, match=f"^me/tiny: .*{words}") as caught:
        fetch()
    assert "\n" not in str(caught.value)
    assert files_below(tmp_path) == []
    assert Path(fetch(), "a.bin").read_bytes() == DATA


@pytest.mark.parametrize(
    ("repo", "options", "words"),
    [
        ("me/other", {}, "404"),
        ("a/b/c", {}, "ORG/NAME"),
        ("../x", {}, "ORG/NAME"),
        ("me/tiny", {"revision": "nope"}, "revision"),
    ],
)
def test_names_that_the_hub_does_not_have(server, repo, options, words):
    with pytest.raises(ValueError, match=words):
        fetch(repo, **options)


def test_what_passes_is_retried_and_continued_from_the_last_chunk(server, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    server.faults["a.bin"] = [("truncate", 1_000_000), ("status", 429), ("stall", 3.0, 100), ("no_range",)]
    server.faults["HEAD a.bin"] = [("status", 500)]
    assert Path(fetch(), "a.bin").read_bytes() == DATA
    ranges = [given for path, given in server.requests if path == "a.bin"]
    assert ranges[:2] == [None, "bytes=1000000-"]


def test_wrong_token_is_told_from_none(server, monkeypatch):
    server.token = "secret"
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ValueError, match="is your HF_TOKEN right"):
        fetch()
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch()


def test_token_goes_to_the_hub_and_nowhere_else(server, monkeypatch):
    """Every file is redirected to another host, which must not see the token."""
    server.token = "secret"
    monkeypatch.setenv("HF_TOKEN", "secret")
    with HubServer(kind="models") as cdn:
        cdn.files = dict(server.files)
        server.cdn = cdn
        fetch()
        assert cdn.tokens and set(cdn.tokens) == {None}


def test_no_network(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ConnectionError, match=r"cannot be reached.*network"):
        fetch()


def test_full_disk_is_named(server, tmp_path):
    """A limit on file sizes stands in for a full disk: the same failing write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(OSError, match="make room") as caught:
            fetch()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert files_below(tmp_path) == []
    assert Path(fetch(), "a.bin").read_bytes() == DATA
