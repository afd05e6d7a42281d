"""Downloads: files of the Hugging Face hub through `huggingface_hub`, and plain addresses.

`huggingface_hub` is the client: it resumes, checks sizes, shows progress, and reads `HF_ENDPOINT` and `HF_TOKEN`. This
file adds what people who start a download need: every failure becomes one line with a remedy (`hub_errors`), failures
that may pass are tried again (`persistently`), and a file whose bytes are not the listed ones is deleted.

Two steps fetch a dataset: `list_dataset` asks for its files and their hashes, `fetch_dataset_files` brings some of
them. `download_url` fetches one file from anywhere else.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nanochat.common import sha256_file

if TYPE_CHECKING:
    import requests

T = TypeVar("T")

AGAIN = "run the same command again; files that have arrived whole are kept"


@contextlib.contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn whatever `huggingface_hub` raises in this block, which asks for `repo`, into one line with a remedy.

    Raises ValueError for what the user has to mend (name, revision, token, HF_ENDPOINT), ConnectionError for what may
    pass (no network, too many requests, a server in trouble), and OSError if the disk is full.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise ValueError(f"{repo!r} is not a name on the hub: it must be like ORG/NAME") from error
    except (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise ValueError(f"{repo} has no such revision or file: check what its page lists") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{repo}: the answer is not a hub's ({error!r:.80}): check HF_ENDPOINT") from error
    except errors.LocalEntryNotFoundError as error:
        # The library looked for the files in its cache because of an earlier error, which is the one to tell.
        raise _explain(repo, error.__cause__ or error) from error
    except (errors.HTTPError, errors.FileMetadataError) as error:
        raise _explain(repo, error) from error
    except OSError as error:
        if error.errno is None:  # the library's word for a body of another length than was promised
            raise ConnectionError(f"{repo}: {str(error).splitlines()[0]} {AGAIN}") from error
        raise OSError(error.errno, f"{repo}: {error.strerror}: make room, or move the cache with HF_HOME") from error


def _explain(repo: str, error: BaseException) -> OSError | ValueError:
    """Return the error to raise for a failed request, by its status code."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):  # no answer came
        reason = type(error).__name__
        return ConnectionError(f"{repo}: the hub cannot be reached ({reason}): check the network; {AGAIN}")
    status = error.response.status_code
    if status in (401, 403, 404):
        # The hub answers 404 for a private repository, too, so as not to say that it exists.
        remedy = "if it is private or gated, set HF_TOKEN"
        if os.environ.get("HF_TOKEN"):
            remedy = "is your HF_TOKEN right, and have you accepted the terms on the repository's page?"
        return ValueError(f"{repo}: the hub answers {status}: check the name; {remedy}")
    if status == 429:
        return ConnectionError(f"{repo}: the hub answers 429, too many requests: wait a while, then {AGAIN}")
    return ConnectionError(f"{repo}: the hub answers {status}: {AGAIN}")


def persistently(attempt: Callable[[], T], repo: str) -> T:
    """Return `attempt()`, which asks the hub for `repo`, tried up to four times; raises as `hub_errors` does.

    The library retries some failures by itself, not all: a 500 in the middle of many files would end the download.
    """
    for pause in (0.5, 2, 8):  # seconds
        try:
            with hub_errors(repo):
                return attempt()
        except ConnectionError as error:
            # The error ends in AGAIN, advice for when we give up; until then we are the ones who try again.
            print(str(error).replace(AGAIN, f"trying again in {pause} s"), flush=True)
            time.sleep(pause)
    with hub_errors(repo):
        return attempt()


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset's repository, with what the hub says of its bytes."""

    path: str
    bytes: int
    sha256: str


def hub_address(mirror: str | None = None) -> str:
    """Return the hub's address: `mirror`, else `$HF_ENDPOINT`, else Hugging Face's."""
    from huggingface_hub import constants

    return mirror or constants.ENDPOINT


def list_dataset(repo: str, mirror: str | None = None) -> tuple[str, dict[str, HubFile]]:
    """Return the newest commit of a dataset's repository, and its large files by path; raises as `hub_errors` does.

    mirror: the address of another hub; None: `$HF_ENDPOINT`, else Hugging Face.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    def ask() -> tuple[str, dict[str, HubFile]]:
        api = HfApi(endpoint=mirror)
        # The files are listed and fetched at this commit, even if the dataset changes in between.
        commit = api.dataset_info(repo).sha or "main"
        files = {}
        for entry in api.list_repo_tree(repo, repo_type="dataset", revision=commit, recursive=True):
            # Large files are kept in LFS, under their SHA-256. Others, and folders, have none.
            if isinstance(entry, RepoFile) and entry.lfs is not None:
                files[entry.path] = HubFile(entry.path, entry.size, entry.lfs.sha256)
        return commit, files

    return persistently(ask, repo)


def fetch_dataset_files(
    repo: str, commit: str, files: Sequence[HubFile], folder: Path, mirror: str | None = None, workers: int = 8
) -> None:
    """Download files of a dataset's repository into `folder`, in parallel, with a progress bar.

    A file appears under its name when it is whole; what has arrived is kept and continued. Raises as `hub_errors`
    does, and ConnectionError if a file's bytes are not the listed ones: then it is deleted.
    """
    from huggingface_hub import snapshot_download

    def fetch() -> None:
        snapshot_download(
            repo,
            repo_type="dataset",
            revision=commit,
            allow_patterns=[file.path for file in files],
            local_dir=folder,
            endpoint=mirror,
            max_workers=workers,
        )

    # What is here was checked when it came; hashing tens of gigabytes again at each start would take long.
    new = [file for file in files if not (folder / file.path).exists()]
    persistently(fetch, repo)
    for file in new:
        path = folder / file.path
        if sha256_file(path) != file.sha256:
            path.unlink()
            raise ConnectionError(f"{path} arrived damaged and was deleted: {AGAIN}")


def download_url(url: str, path: Path, *, attempts: int = 6, timeout: float = 30.0, pause: float = 1.0) -> None:
    """Download a plain URL, which is not on the hub, to `path`, which appears when it is whole.

    A transfer that breaks off is continued while the server still has the same file. Attempts are `pause`, 2 `pause`,
    4 `pause`, ... seconds apart. Raises ValueError if the address is wrong, ConnectionError if attempts run out.
    """
    import requests

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    etag = None  # the server's name for the version of the file that it sends
    problem = ""
    try:
        with open(part, "wb") as file:
            for failures in range(attempts):
                if failures:
                    time.sleep(min(60.0, pause * 2 ** (failures - 1)))
                try:
                    with _request(url, file.tell(), etag, timeout) as response:
                        if response.status_code != 206:  # not "partial content": the whole file, from its first byte
                            file.seek(0)
                            file.truncate()
                        etag = response.headers.get("ETag")
                        for chunk in response.iter_content(1 << 20):  # raises if fewer bytes come than were promised
                            file.write(chunk)
                    break
                except requests.RequestException as error:
                    problem = str(error)
            else:
                raise ConnectionError(f"{url}: {problem}: run the same command again")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _request(url: str, start: int, etag: str | None, timeout: float) -> "requests.Response":
    """Ask for the bytes of a file from `start` on; raises ValueError if asking again would not help."""
    import requests

    headers = {"Accept-Encoding": "identity"}  # a compressed body would have another length
    if start and etag:
        headers["Range"] = f"bytes={start}-"
        headers["If-Range"] = etag  # if the file has changed since, the server sends all of it
    try:
        response = requests.get(url, headers=headers, stream=True, timeout=timeout)
    except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema) as error:
        raise ValueError(f"{url}: {error}") from error
    status = response.status_code
    may_pass = status in (408, 429)  # the server was too slow, or was asked too often
    if 400 <= status < 500 and not may_pass:
        raise ValueError(f"{url}: the server answers {status}: check the address")
    response.raise_for_status()
    return response
