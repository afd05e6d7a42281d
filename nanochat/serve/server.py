"""Around the routes: request ids, API keys, other origins, the access log; and the waitress server.

Flask calls `begin` before each request and `end` after it, whichever route it takes. Each answer holds a thread of
waitress while it is made.
"""

import hmac
import json
import logging
import os
import re
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.serve.models import KEYS_VARIABLE, Models
from nanochat.serve.schema import ApiError

if TYPE_CHECKING:
    import flask

access_log = logging.getLogger("nanochat.access")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def read_api_keys(path: str | None) -> list[str]:
    """Return the keys of a file (one a line, # for comments) and of $NANOCHAT_API_KEYS.

    Raises ValueError for a file without any key, and for a key so short that it could be guessed.
    """
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    if path is not None:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
        listed = [line for line in lines if line and not line.startswith("#")]
        if not listed:
            raise ValueError(f"--api-keys {path}: there is no key in it; leave the flag out to serve without keys")
        keys += listed
    if any(len(key) < 8 for key in keys):
        raise ValueError("an API key has less than 8 characters: make longer ones")
    return keys


def add_policy(app: "flask.Flask", models: Models) -> None:
    """Register on `app` what holds for every route. Raises ValueError for bad API keys."""
    import flask
    from werkzeug.exceptions import HTTPException

    keys = read_api_keys(models.config.api_keys)
    origins = {origin.strip().rstrip("/") for origin in (models.config.cors_origin or "").split(",")} - {""}

    @app.before_request
    def begin() -> Any:
        request = flask.request
        # A proxy's id is taken over, so that its log and ours can be joined; only safe characters get into a log line.
        given = request.headers.get("X-Request-Id", "")
        flask.g.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        flask.g.started = time.monotonic()
        flask.g.owner = 0  # the number of the API key; sessions belong to it
        flask.g.facts = {}  # what an answer adds to the access log
        is_preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        # A browser sends the preflight of a cross-origin request without its key, so it is answered before keys count.
        if is_preflight and allowed_origin():
            return "", 204
        # Load balancers ask for /health and have no key.
        if keys and request.path != "/health":
            flask.g.owner = owner_of(request)
        return None

    def owner_of(request: "flask.Request") -> int:
        given = ""
        if request.authorization:
            given = request.authorization.token or request.authorization.password or ""
        # In constant time, and without stopping at the first match: the duration tells a guesser nothing.
        matches = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
        if not any(matches):
            # Asked with Basic, a browser shows its own dialog: any name, the key as password. So the page works, too.
            ask = {"WWW-Authenticate": 'Basic realm="nanochat: the password is an API key"'}
            message = "no valid API key: send 'Authorization: Bearer KEY'"
            raise ApiError(401, message, code="invalid_api_key", headers=ask)
        return matches.index(True)

    def allowed_origin() -> str | None:
        origin = flask.request.headers.get("Origin")
        return origin if origin and (origin in origins or "*" in origins) else None

    @app.errorhandler(ApiError)
    def api_error(error: ApiError) -> tuple[dict, int, dict]:
        return error.body, error.status, error.headers

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> tuple[dict, int, dict]:
        """Give what Flask and werkzeug refuse (404, 405, 413 ...) the same shape."""
        headers = {name: value for name, value in error.get_response().headers.items() if name == "Allow"}
        return api_error(ApiError(error.code or 500, error.description or error.name, headers=headers))

    @app.after_request
    def end(response: flask.Response) -> flask.Response:
        response.headers["X-Request-Id"] = flask.g.request_id
        # A browser takes the declared type, and does not guess that an answer's text might be a page.
        response.headers["X-Content-Type-Options"] = "nosniff"
        if origins:
            response.headers.add("Vary", "Origin")  # or a shared cache would give one site the answer for another
        origin = allowed_origin()
        if origin is not None:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE"
            # Whatever was asked for: OpenAI's own client in a page sends a dozen headers about itself.
            asked = flask.request.headers.get("Access-Control-Request-Headers", "Authorization, Content-Type")
            response.headers["Access-Control-Allow-Headers"] = asked
            response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, X-Cache, Retry-After"
        if response.status_code >= 400:
            models.metrics.refused.labels(str(response.status_code)).inc()
        write_when_sent(response)
        return response

    def write_when_sent(response: flask.Response) -> None:
        """Write the access log's line when the body has been sent: a stream's facts are known only then."""
        line = {
            "request_id": flask.g.request_id,
            "method": flask.request.method,
            "path": flask.request.path,
            "client": flask.request.remote_addr,
            "key": flask.g.owner,
            "status": response.status_code,
        }
        facts = flask.g.facts
        started = flask.g.started

        def write() -> None:
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            seconds = round(time.monotonic() - started, 4)
            access_log.info(json.dumps({"time": now, **line, "seconds": seconds, **facts}))

        response.call_on_close(write)


def make_server(app: "flask.Flask", host: str, port: int) -> Any:
    """Return a waitress server around `app`, bound but not yet running: `.run()` serves, `.effective_port` is its port.

    Raises OSError when the address is taken.
    """
    import waitress

    # An answer holds a thread while it is made: one for each that may be open, and some for all other routes.
    threads = app.extensions["models"].most_open + 8
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # the queue's length is in our own metrics
    return waitress.create_server(
        app,
        host=host,
        port=port,
        ipv4=":" not in host,  # one socket, even if a name has addresses of both kinds
        ipv6=":" in host,
        threads=threads,
        connection_limit=max(1000, 4 * threads),
        asyncore_use_poll=True,  # select() cannot watch more than 1,024 connections
        # Flask refuses longer bodies with 413. This is the limit on what waitress buffers before Flask sees them.
        max_request_body_size=8 * app.config["MAX_CONTENT_LENGTH"],
        channel_request_lookahead=1,  # without it waitress does not notice a client that leaves before its answer
        clear_untrusted_proxy_headers=True,
    )


def drain(server: Any, models: Models, seconds: float) -> bool:
    """Refuse new answers and wait until all that were begun are sent. Returns False if `seconds` were too short."""
    # The order matters. First no new answers, or there would be no end. Then the engines finish what they have begun.
    # Last the sockets: an answer that the engine has made may still lie in waitress' buffers, and a process that ended
    # now would cut it off.
    models.drain()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        channels = list(server.active_channels.values())
        is_sending = any(channel.requests or channel.total_outbufs_len for channel in channels)
        if models.n_open == 0 and not is_sending:
            return True
        time.sleep(0.02)
    return False
