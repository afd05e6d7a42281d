"""A small hub on 127.0.0.1 that serves files with ranges, lists them, and misbehaves on request."""

import contextlib
import hashlib
import json
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class HubServer:
    """`files` are path -> bytes of a dataset's or a model's repository; `faults[path]` are dealt out one a request:

    ("status", code), ("truncate", bytes), ("body", bytes), ("no_range",), ("stall", seconds, after_bytes).
    A model's .json files have no SHA-256 in the listing. token: required in every request. cdn: another server, to
    which requests for files are sent on.
    """

    def __init__(self, repo: str = "me/tiny", page: int = 2, kind: str = "datasets") -> None:
        self.repo, self.page, self.lists = repo, page, True
        self.token: str | None = None
        self.cdn: HubServer | None = None
        self.commit = "0" * 40
        self.sizes: dict[str, int] = {}  # lies of the listing
        self.tokens: list[str | None] = []
        self.root = f"/datasets/{repo}/resolve/main/" if kind == "datasets" else f"/{repo}/resolve/"
        self.api = f"/api/{kind}/{repo}"
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[tuple]] = defaultdict(list)
        self.requests: list[tuple[str, str | None]] = []  # path, Range
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):  # the client went away
                    hub.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def file_url(self, path: str) -> str:
        return f"{self.url}{self.root}{path}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        path = parts.path.removeprefix(self.root).removeprefix(f"{self.commit}/")
        self.requests.append((path, request.headers.get("Range")))
        self.tokens.append(request.headers.get("Authorization"))
        if self.token and self.tokens[-1] != f"Bearer {self.token}":
            request.send_response(401)
            request.send_header("Content-Length", "0")
            return request.end_headers()
        if parts.path.startswith(f"{self.api}/revision/"):
            return self._json(request, {"sha": self.commit})
        if parts.path in (f"{self.api}/tree/main", f"{self.api}/tree/{self.commit}") and self.lists:
            return self._list(request, int(parse_qs(parts.query).get("cursor", ["0"])[0]))
        if self.cdn:
            request.send_response(302)
            request.send_header("Location", self.cdn.file_url(path).replace("127.0.0.1", "localhost"))
            request.send_header("Content-Length", "0")
            return request.end_headers()
        fault = self.faults[path].pop(0) if self.faults[path] else ("none",)
        if fault[0] == "status" or path not in self.files:
            request.send_response(fault[1] if fault[0] == "status" else 404)
            request.send_header("Content-Length", "0")
            return request.end_headers()
        data = fault[1] if fault[0] == "body" else self.files[path]
        etag, start = f'"{hashlib.md5(data).hexdigest()}"', 0
        wanted = request.headers.get("Range")
        if wanted and fault[0] != "no_range" and request.headers.get("If-Range", etag) == etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(len(data) - start))
        request.send_header("ETag", etag)
        request.end_headers()
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

    def _list(self, request: BaseHTTPRequestHandler, cursor: int) -> None:
        entries = [{"type": "directory", "path": "data", "size": 0}] if cursor == 0 else []
        for path in sorted(self.files)[cursor : cursor + self.page]:
            data = self.files[path]
            entry = {"type": "file", "path": path, "size": self.sizes.get(path, len(data))}
            if "models" not in self.api or not path.endswith(".json"):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
            entries.append(entry)
        following = None
        if cursor + self.page < len(self.files):  # the real hub names itself here, whatever mirror was asked
            following = f"http://hub.invalid{self.api}/tree/main?recursive=true&cursor={cursor + self.page}"
        self._json(request, entries, following)

    def _json(self, request: BaseHTTPRequestHandler, value: object, following: str | None = None) -> None:
        body = json.dumps(value).encode()
        request.send_response(200)
        if following:
            request.send_header("Link", f'<{following}>; rel="next"')
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)
