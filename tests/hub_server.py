"""A small Hugging Face hub on 127.0.0.1 for the tests, which misbehaves on request.

It speaks as much of the protocol as `huggingface_hub` needs: repository facts, the listing of files, HEAD with the
commit and the ETag of a file, and GET with ranges.
"""

import contextlib
import hashlib
import json
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class HubServer:
    """A hub with one repository, whose `files` are path -> bytes.

    `faults[path]` are dealt out one per GET of that file, `faults["HEAD " + path]` one per HEAD, and `faults["api"]`
    one per question about the repository: ("status", code), ("truncate", bytes), ("body", bytes), ("no_range",),
    ("stall", seconds, after_bytes). .json files have no SHA-256 in the listing, as on the real hub, which keeps only
    large files in LFS. `token` is then required in every request. `cdn` is another server, to which requests for
    files are redirected.
    """

    def __init__(self, repo: str = "me/tiny", page: int = 2, kind: str = "datasets") -> None:
        self.repo = repo
        self.page = page
        self.lists = True
        self.token: str | None = None
        self.cdn: HubServer | None = None
        self.commit = "0" * 40
        self.sizes: dict[str, int] = {}  # lies of the listing
        self.tokens: list[str | None] = []
        self.root = f"/datasets/{repo}/resolve/" if kind == "datasets" else f"/{repo}/resolve/"
        self.api = f"/api/{kind}/{repo}"
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[tuple]] = defaultdict(list)
        self.requests: list[tuple[str, str | None]] = []  # path and Range of each GET
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):  # the client went away
                    hub.answer(self)

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def use(self, monkeypatch, cache) -> None:
        """Make `huggingface_hub`, here and in child processes, talk to this hub and keep files under `cache`.

        The library reads its environment once, when it is imported."""
        from huggingface_hub import constants

        monkeypatch.setenv("HF_ENDPOINT", self.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)

    def file_url(self, path: str) -> str:
        return f"{self.url}{self.root}main/{path}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        self.tokens.append(request.headers.get("Authorization"))
        if self.token and self.tokens[-1] != f"Bearer {self.token}":
            return self._refuse(request, 401)
        if parts.path.startswith("/api/"):
            return self._answer_api(request, parts.path, parse_qs(parts.query))
        path = parts.path.removeprefix(self.root).partition("/")[2]
        head = request.command == "HEAD"
        faults = self.faults[f"HEAD {path}" if head else path]
        if not head:
            self.requests.append((path, request.headers.get("Range")))
        fault = faults.pop(0) if faults else ("none",)
        if fault[0] == "status":
            return self._refuse(request, fault[1])
        if not parts.path.startswith(self.root) or (path not in self.files and not self.cdn):
            return self._refuse(request, 404, "EntryNotFound")
        if self.cdn:
            request.send_response(302)
            request.send_header("Location", self.cdn.file_url(path).replace("127.0.0.1", "localhost"))
            self._send_facts(request, path, self.files[path])
            request.send_header("Content-Length", "0")
            return request.end_headers()
        data = fault[1] if fault[0] == "body" else self.files[path]
        start = 0
        wanted = request.headers.get("Range")
        same = request.headers.get("If-Range") in (None, f'"{hashlib.md5(data).hexdigest()}"')
        if wanted and same and fault[0] != "no_range":
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            request.send_response(200)
        self._send_facts(request, path, data)
        request.send_header("Content-Length", str(len(data) - start))
        request.end_headers()
        if head:
            return None
        body = data[start:]
        if fault[0] == "truncate":
            request.wfile.write(body[: fault[1]])
            request.close_connection = True
        elif fault[0] == "stall":
            request.wfile.write(body[: fault[2]])
            time.sleep(fault[1])
            request.wfile.write(body[fault[2] :])
        else:
            request.wfile.write(body)
        return None

    def _answer_api(self, request: BaseHTTPRequestHandler, path: str, query: dict[str, list[str]]) -> None:
        rest = path.removeprefix(self.api)
        if rest == path:
            return self._refuse(request, 404, "RepoNotFound")
        fault = self.faults["api"].pop(0) if self.faults["api"] else ("none",)
        if fault[0] == "status":
            return self._refuse(request, fault[1])
        if fault[0] == "body":
            return self._json(request, fault[1])
        pieces = rest.split("/")  # "", "tree" or "revision", the revision, a folder
        revision = pieces[2] if len(pieces) > 2 else "main"
        if revision not in ("main", self.commit):
            return self._refuse(request, 404, "RevisionNotFound")
        if len(pieces) > 3:
            return self._refuse(request, 404, "EntryNotFound")
        if rest.startswith("/tree/") and self.lists:
            return self._list(request, int(query.get("cursor", ["0"])[0]))
        if rest == "" or rest.startswith("/revision/"):
            siblings = [{"rfilename": each["path"], "size": each["size"]} for each in self._entries()]
            return self._json(request, {"id": self.repo, "sha": self.commit, "siblings": siblings})
        return self._refuse(request, 404)

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, code: str | None = None) -> None:
        request.send_response(status)
        if code:
            request.send_header("X-Error-Code", code)
        if status == 429:
            request.send_header("Retry-After", "0")
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _hash(self, path: str, data: bytes) -> str:
        """The hub's name for the bytes of a file: SHA-256 in LFS, git's own SHA-1 otherwise."""
        if path.endswith(".json"):
            return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return hashlib.sha256(data).hexdigest()

    def _send_facts(self, request: BaseHTTPRequestHandler, path: str, data: bytes) -> None:
        request.send_header("X-Repo-Commit", self.commit)
        request.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        request.send_header("X-Linked-Etag", f'"{self._hash(path, self.files[path])}"')
        request.send_header("X-Linked-Size", str(self.sizes.get(path, len(self.files[path]))))

    def _entries(self) -> list[dict]:
        entries = []
        for path in sorted(self.files):
            data = self.files[path]
            size = self.sizes.get(path, len(data))
            entry = {"type": "file", "path": path, "size": size, "oid": self._hash(path, data)[:40]}
            if not path.endswith(".json"):
                entry["lfs"] = {"oid": self._hash(path, data), "size": size, "pointerSize": 130}
            entries.append(entry)
        return entries

    def _list(self, request: BaseHTTPRequestHandler, cursor: int) -> None:
        entries = [{"type": "directory", "path": "data", "size": 0, "oid": "0" * 40}] if cursor == 0 else []
        entries += self._entries()[cursor : cursor + self.page]
        following = None
        if cursor + self.page < len(self.files):
            following = f"{self.url}{self.api}/tree/{self.commit}?recursive=true&cursor={cursor + self.page}"
        self._json(request, entries, following)

    def _json(self, request: BaseHTTPRequestHandler, value: object, following: str | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        request.send_response(200)
        if following:
            request.send_header("Link", f'<{following}>; rel="next"')
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)
