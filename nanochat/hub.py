"""Files from a Hugging Face style hub: list, download, resume, verify.

A download grows in `NAME.part` and is renamed to `NAME` only when its length and hash are right, so a file under
its final name is always whole. Whatever goes wrong before that is retried, from the last good byte where the
server allows it.
"""

import contextlib
import fcntl
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, quote, urlsplit

from nanochat.common import fsync_dir, sha256_file

if TYPE_CHECKING:
    import requests

T = TypeVar("T")
Progress = Callable[[int], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file of a hub repository: its path there, its address, and what the hub says of its bytes (None = nothing)."""

    path: str
    url: str
    size: int | None = None
    sha256: str | None = None


class _Damaged(Exception):
    """The bytes that arrived are not the file's."""


def base_url(mirror: str | None = None) -> str:
    """The hub's address: `mirror`, else `$NANOCHAT_HUB`, else Hugging Face."""
    return (mirror or os.environ.get("NANOCHAT_HUB") or "https://huggingface.co").rstrip("/")


def list_dataset_files(
    repo: str, mirror: str | None = None, *, timeout: float = 30.0, retries: int = 6, backoff: float = 1.0
) -> list[RemoteFile]:
    """All files of a dataset repository with sizes and, where the hub keeps one, SHA-256.

    Raises ValueError when the hub does not know the repository, ConnectionError when it cannot be reached.
    """
    base = base_url(mirror)
    tree, root = f"{base}/api/datasets/{repo}/tree/main", f"{base}/datasets/{repo}/resolve/main"
    return _list_files(tree, root, timeout, retries, backoff)


def list_model_files(
    repo: str, revision: str = "main", *, timeout: float = 30.0, retries: int = 6, backoff: float = 1.0
) -> tuple[str, list[RemoteFile]]:
    """(commit, files) of a model repository, as it stands at a branch, tag or commit; raises as `list_dataset_files`.

    `$HF_TOKEN` opens private and gated ones; it is sent to the hub alone, never along with a redirection elsewhere.
    """
    base, url = base_url(), f"{base_url()}/api/models/{repo}/revision/{quote(revision, safe='')}"

    def ask() -> Any:
        with _request(url, {}, timeout) as response:
            return response.json()

    answer = _retry(ask, url, retries, backoff)
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{7,64}", commit):
        raise ValueError(f"{url}: the hub names no commit: is it one that serves models?")
    tree, root = f"{base}/api/models/{repo}/tree/{commit}", f"{base}/{repo}/resolve/{commit}"
    return commit, _list_files(tree, root, timeout, retries, backoff)


def _list_files(url: str, root: str, timeout: float, retries: int, backoff: float) -> list[RemoteFile]:
    """All files below the listing at `url`, to be fetched below `root`."""
    files, query = [], {"recursive": "true"}

    def page() -> tuple[list[dict[str, Any]], str | None]:
        with _request(url, {}, timeout, params=query) as response:
            return response.json(), response.links.get("next", {}).get("url")

    while query:
        entries, following = _retry(page, url, retries, backoff)
        try:
            there = [entry for entry in entries if entry["type"] == "file"]
            files += [_listed(root, each["path"], each["size"], (each.get("lfs") or {}).get("oid")) for each in there]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{url}: not a listing of files ({error!r:.80}): is it a hub?") from error
        # Only the cursor is taken from the next page's address: behind a mirror, its host is another.
        query = dict(parse_qsl(urlsplit(following).query)) if following else {}
    return files


def _listed(root: str, path: str, size: int, sha256: str | None) -> RemoteFile:
    if path.startswith("/") or {"..", ".", ""} & set(path.split("/")) or "\\" in path:
        raise ValueError(f"the hub lists {path!r:.80} below {root}, which would lie outside the folder")
    return RemoteFile(path, f"{root}/{quote(path)}", int(size), sha256)


def download(
    url: str,
    path: Path | str,
    *,
    size: int | None = None,
    sha256: str | None = None,
    timeout: float = 30.0,
    retries: int = 6,
    backoff: float = 1.0,
    progress: Progress | None = None,
) -> Path:
    """Fetch `url` into `path`, which afterwards holds the whole, verified file; a file already there is kept.

    `timeout` is seconds without a byte; attempts are `backoff`·2ⁿ seconds apart, with jitter. A partial file of an
    earlier process is continued only when `sha256` can vouch for the result. `progress` is called with every number
    of bytes gained (negative when some are thrown away). Two processes that want one file take turns.
    Raises ValueError for an address that will never work, ConnectionError when the retries are spent.
    """
    path, report = Path(path), progress or (lambda count: None)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "a+b", buffering=0) as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        if path.exists() and size in (None, path.stat().st_size):
            part.unlink(missing_ok=True)
            report(path.stat().st_size)
            return path
        report(f.seek(0, os.SEEK_END))
        etag: list[str] = []

        def attempt() -> None:
            offset = f.seek(0, os.SEEK_END)
            if offset != size:
                length = _transfer(url, f, etag, timeout, report, sha256 is not None)
                offset = f.tell()
                if length is not None and offset < length:
                    raise _Damaged(f"{offset} of {length} bytes arrived")  # kept: the next attempt continues
            if size is not None and offset != size:
                fault = f"it has {offset} bytes, not {size}"
            elif sha256 is not None and sha256_file(part) != sha256:
                fault = "its SHA-256 is not the expected one"
            else:
                return
            _discard(f, report)
            raise _Damaged(fault)

        try:
            _retry(attempt, url, retries, backoff, report)
            os.fsync(f.fileno())
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(part)) from error  # a full disk: say where
        os.replace(part, path)
    fsync_dir(path.parent)
    return path


def download_many(
    files: Sequence[RemoteFile], folder: Path | str, *, workers: int = 8, label: str = "download", **options: Any
) -> list[Path]:
    """Download `files` into `folder` under their repository paths, `workers` at a time, behind one progress bar.

    `options` are `download`'s. The first failure stops the rest and is raised; a rerun continues.
    """
    from tqdm import tqdm

    total = None if any(file.size is None for file in files) else sum(file.size or 0 for file in files)
    stop, lock = threading.Event(), threading.Lock()

    def progress(count: int) -> None:
        if stop.is_set():
            raise InterruptedError("stopped")
        with lock:
            bar.update(count)

    def fetch(file: RemoteFile) -> Path:
        path = Path(folder) / file.path
        return download(file.url, path, size=file.size, sha256=file.sha256, progress=progress, **options)

    bar = tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=None)
    with bar, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(fetch, file) for file in files]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


@contextlib.contextmanager
def _request(
    url: str, headers: dict[str, str], timeout: float, params: dict[str, str] | None = None
) -> "Iterator[requests.Response]":
    """A streamed GET. Answers that no retry mends raise ValueError; the others that are no success, HTTPError."""
    import requests

    token = os.environ.get("HF_TOKEN")
    if token and urlsplit(url)[:2] == urlsplit(base_url())[:2]:  # `requests` drops it when another host takes over
        headers = {**headers, "Authorization": f"Bearer {token}"}
    with requests.get(url, params=params, headers=headers, stream=True, timeout=timeout) as response:
        status = response.status_code
        if status in (401, 403):
            remedy = "is your HF_TOKEN right, and its terms accepted?" if token else "if it is private, set HF_TOKEN"
            raise ValueError(f"{url}: the server answers {status} {response.reason}: check the name; {remedy}")
        if 400 <= status < 500 and status not in (408, 416, 429):
            raise ValueError(f"{url}: the server answers {status} {response.reason}: check the name or the mirror")
        if status != 416:
            response.raise_for_status()
        yield response


def _transfer(url: str, f: IO[bytes], etag: list[str], timeout: float, report: Progress, resumable: bool) -> int | None:
    """Append what is missing of `url` to `f`, or all of it when the server will not continue; its length, if told."""
    offset = f.tell()
    headers = {"Accept-Encoding": "identity"}  # a compressed body would have another length
    if offset and (resumable or etag):
        headers["Range"] = f"bytes={offset}-"
        if etag:
            headers["If-Range"] = etag[0]
    with _request(url, headers, timeout) as response:
        answer = response.headers
        parts = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.get("Content-Range", ""))
        if response.status_code == 206 and parts and int(parts[1]) == offset:
            length: int | None = int(parts[2])
        elif response.status_code == 200:
            _discard(f, report)
            length = int(answer["Content-Length"]) if "Content-Length" in answer else None
            if length is None and not resumable and answer.get("Transfer-Encoding") != "chunked":
                raise ValueError(f"{url}: the server tells no length, so a broken transfer could not be seen")
        else:
            _discard(f, report)
            raise _Damaged(f"the server will not continue from byte {offset} ({response.status_code})")
        tag = answer.get("ETag", "")
        etag[:] = [tag] if tag and not tag.startswith("W/") else []
        for chunk in response.iter_content(1 << 16):
            report(len(chunk))
            while chunk:
                chunk = chunk[f.write(chunk) :]
    return length


def _discard(f: IO[bytes], report: Progress) -> None:
    report(-f.seek(0, os.SEEK_END))
    f.truncate(0)


def _retry(attempt: Callable[[], T], url: str, retries: int, backoff: float, report: Progress | None = None) -> T:
    """`attempt()`, again after every passing failure, with exponential pauses."""
    import requests

    for failures in range(retries + 1):
        try:
            return attempt()
        except (requests.RequestException, _Damaged) as error:
            if isinstance(error, ValueError):  # requests' word for a bad address, or an answer that is not JSON
                raise ValueError(f"{url}: {error}") from error
            if failures == retries:
                message = f"{url}: {error} (attempt {failures + 1}): run the same command again to continue"
                raise ConnectionError(message) from error
            response = getattr(error, "response", None)
            asked = response.headers.get("Retry-After", "") if response is not None else ""
        pause = min(60.0, backoff * 2**failures) * random.uniform(0.5, 1.5)
        until = time.monotonic() + max(pause, min(60.0, float(asked) if asked.isdigit() else 0.0))
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(0.2, left))
            if report:
                report(0)  # lets the caller stop us
    raise AssertionError("unreachable")


# ---- new: the part above this line goes when dataset, CORE bundle and tasks use huggingface_hub ----

AGAIN = "run the same command again; files that have arrived whole are kept"


@contextlib.contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn whatever `huggingface_hub` raises in this block, which asks for `repo`, into one line with a remedy.

    Raises ValueError for what the user has to mend (name, revision, token, HF_ENDPOINT), ConnectionError for what may
    pass (no network, too many requests, a server in trouble), and OSError for a disk that is full."""
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
    response = getattr(error, "response", None)
    if response is None:
        return ConnectionError(
            f"{repo}: the hub cannot be reached ({type(error).__name__}): check the network; {AGAIN}"
        )
    status = response.status_code
    if status in (401, 403, 404):
        remedy = "is your HF_TOKEN right, and have you accepted the terms on the repository's page?"
        if not os.environ.get("HF_TOKEN"):
            remedy = "if it is private or gated, set HF_TOKEN"
        return ValueError(f"{repo}: the hub answers {status}: check the name; {remedy}")
    if status == 429:
        return ConnectionError(f"{repo}: the hub answers 429, too many requests: wait a while, then {AGAIN}")
    return ConnectionError(f"{repo}: the hub answers {status}: {AGAIN}")


Attempt = TypeVar("Attempt")


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

    def ask() -> tuple[str, dict[str, HubFile]]:
        api = HfApi(endpoint=mirror)
        commit = api.dataset_info(repo).sha
        tree = api.list_repo_tree(repo, repo_type="dataset", revision=commit, recursive=True)
        # Large files are kept in LFS, under their SHA-256. Others, and folders, have none.
        large = [entry for entry in tree if getattr(entry, "lfs", None)]
        return commit, {entry.path: HubFile(entry.path, entry.size, entry.lfs.sha256) for entry in large}

    return _persistently(ask, repo)


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

    there_before = {file.path for file in files if (folder / file.path).exists()}
    _persistently(fetch, repo)
    for file in files:
        if file.path not in there_before and sha256_file(folder / file.path) != file.sha256:
            (folder / file.path).unlink()
            raise ConnectionError(f"{folder / file.path} arrived damaged and was deleted: {AGAIN}")


def _persistently(attempt: Callable[[], Attempt], repo: str) -> Attempt:
    """Return `attempt()`, tried again after failures that may pass. (The library retries some of them, not all.)"""
    for pause in (0.5, 2, 8, None):
        try:
            with hub_errors(repo):
                return attempt()
        except ConnectionError as error:
            if pause is None:
                raise
            print(f"{error} (trying again in {pause} s)", flush=True)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def download_url(url: str, path: Path, *, attempts: int = 6, timeout: float = 30.0, pause: float = 1.0) -> None:
    """Download a plain URL, which is not on the hub, to `path`, which appears when it is whole.

    A transfer that breaks off is continued while the server still has the same file. Attempts are `pause`, 2 `pause`,
    4 `pause`, ... seconds apart. Raises ValueError if the address is wrong, ConnectionError if attempts run out.
    """
    import requests

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    etag = None
    try:
        with open(part, "wb") as f:
            for failures in range(attempts):
                headers = {"Accept-Encoding": "identity"}  # a compressed body would have another length
                if f.tell() and etag:
                    headers.update({"Range": f"bytes={f.tell()}-", "If-Range": etag})
                try:
                    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
                        if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
                            raise ValueError(f"{url}: the server answers {response.status_code}: check the address")
                        response.raise_for_status()
                        if response.status_code != 206:  # the whole file, from its first byte
                            f.seek(0)
                            f.truncate()
                        etag = response.headers.get("ETag")
                        length = response.headers.get("Content-Length")
                        expected = f.tell() + int(length) if length else None
                        for chunk in response.iter_content(1 << 20):
                            f.write(chunk)
                    if expected is None or f.tell() == expected:
                        break
                    problem = f"{f.tell()} of {expected} bytes arrived"
                except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema) as error:
                    raise ValueError(f"{url}: {error}") from error
                except requests.RequestException as error:
                    problem = str(error)
                if failures == attempts - 1:
                    raise ConnectionError(f"{url}: {problem}: run the same command again")
                time.sleep(min(60.0, pause * 2**failures))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
