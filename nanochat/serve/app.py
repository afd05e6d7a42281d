"""The chat page and the OpenAI API over a model or several: Flask under waitress. What it takes is described in api.py,
what it gives in answers.py, both by /openapi.json."""

import base64
import hashlib
import hmac
import json
import logging
import os
import re
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.engine import Engine
from nanochat.serve.openapi import describe
from nanochat.serve.schema import ApiError, ChatRequest, CompletionRequest, read_body
from nanochat.serve.service import KEYS_VARIABLE, Completion, Models, ServerConfig

if TYPE_CHECKING:
    import flask

access_log = logging.getLogger("nanochat.access")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def read_api_keys(path: str | None) -> list[str]:
    """Keys of a file and of the environment. Raises ValueError for a file without any, and for keys that are guessed
    too soon."""
    keys = [key for each in os.environ.get(KEYS_VARIABLE, "").split(",") if (key := each.strip())]
    if path is not None:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
        if not (listed := [line for line in lines if line and not line.startswith("#")]):
            raise ValueError(f"--api-keys {path}: there is no key in it; leave the flag out to serve without keys")
        keys += listed
    if any(len(key) < 8 for key in keys):
        raise ValueError("an API key has less than 8 characters: make longer ones")
    return keys


def bare_app(max_body: int) -> "flask.Flask":
    """An application without any path: what it refuses has the API's shape, and all it says has a request's id."""
    import flask
    from werkzeug.exceptions import HTTPException

    app = flask.Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = max_body

    @app.before_request
    def identify() -> None:
        given = flask.request.headers.get("X-Request-Id", "")
        flask.g.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

    @app.after_request
    def say_id(response: flask.Response) -> flask.Response:
        response.headers["X-Request-Id"] = flask.g.request_id
        return response

    @app.errorhandler(ApiError)
    def api_error(error: ApiError) -> tuple[dict, int, dict]:
        return error.body, error.status, error.headers

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> tuple[dict, int, dict]:
        allow = {name: value for name, value in error.get_response().headers.items() if name == "Allow"}
        return api_error(ApiError(error.code or 500, error.description or error.name, headers=allow))

    return app


def create_app(
    engine: Engine | Models, model_name: str = "nanochat", config: ServerConfig | None = None
) -> "flask.Flask":
    """The application over one engine, or over several models. `app.extensions["models"]` are they: its `add` brings
    another, its `close` ends their threads."""
    if isinstance(engine, Models):
        models = engine
    else:
        models = Models(config or ServerConfig())
        models.add(model_name, engine)
    app = bare_app(models.config.max_body)
    app.extensions["models"] = models
    _add_policy(app, models, read_api_keys(models.config.api_keys))
    _add_pages(app, models)
    _add_completions(app, models)
    return app


def _add_policy(app: "flask.Flask", models: Models, keys: list[str]) -> None:
    """What holds for all routes: keys, origins, request ids, the access log."""
    import flask

    origins = {origin.strip().rstrip("/") for origin in (models.config.cors_origin or "").split(",")} - {""}

    @app.before_request
    def begin() -> Any:
        request = flask.request
        flask.g.started, flask.g.facts, flask.g.owner = time.monotonic(), {}, 0
        if request.method == "OPTIONS" and allowed_origin() and "Access-Control-Request-Method" in request.headers:
            return "", 204
        if not keys or request.path == "/health":
            return None
        given = (request.authorization.token or request.authorization.password or "") if request.authorization else ""
        # all are compared, whichever fits: the time tells nothing
        fits = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
        if not any(fits):
            # a browser asks its user for a name, which does not matter, and a password: the page works with keys, too
            ask = {"WWW-Authenticate": 'Basic realm="nanochat: the password is an API key"'}
            message = "no valid API key: send 'Authorization: Bearer KEY'"
            raise ApiError(401, message, code="invalid_api_key", headers=ask)
        flask.g.owner = fits.index(True)
        return None

    def allowed_origin() -> str | None:
        origin = flask.request.headers.get("Origin")
        return origin if origin and (origin in origins or "*" in origins) else None

    @app.after_request
    def end(response: flask.Response) -> flask.Response:
        response.headers["X-Content-Type-Options"] = "nosniff"
        if origins:
            response.headers.add("Vary", "Origin")
        if origin := allowed_origin():
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE"
            # any, as OpenAI's own client in a page sends a dozen about itself
            asked = flask.request.headers.get("Access-Control-Request-Headers", "Authorization, Content-Type")
            response.headers["Access-Control-Allow-Headers"] = asked
            response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, X-Cache, Retry-After"
        if response.status_code >= 400:
            models.metrics.refused.labels(str(response.status_code)).inc()
        line = {"request_id": flask.g.request_id, "method": flask.request.method, "path": flask.request.path}
        line |= {"client": flask.request.remote_addr, "key": flask.g.owner, "status": response.status_code}
        facts, started = flask.g.facts, flask.g.started

        def write() -> None:
            line["seconds"] = round(time.monotonic() - started, 4)
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            access_log.info(json.dumps({"time": when, **line, **facts}))

        response.call_on_close(write)
        return response


def _page_and_policy() -> tuple[str, str]:
    """The chat page, and a Content-Security-Policy that lets nothing run in it but its own script."""
    page = Path(__file__).with_name("ui.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in found)

    policy = f"default-src 'none'; style-src {hashes('style')}; script-src {hashes('script')}; connect-src 'self'; "
    return page, policy + "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def _add_pages(app: "flask.Flask", models: Models) -> None:
    """The page, and what can be asked of the server itself."""
    import flask

    page, policy = _page_and_policy()
    description = describe("nanochat")

    @app.get("/")
    def index() -> flask.Response:
        return flask.Response(page, mimetype="text/html", headers={"Content-Security-Policy": policy})

    @app.get("/health")
    def health() -> tuple[dict, int]:
        return {"status": models.trouble or "ok"}, 503 if models.trouble else 200

    @app.get("/stats")
    def stats() -> dict:
        return models.stats()

    @app.get("/metrics")
    def metrics() -> flask.Response:
        return flask.Response(models.metrics.text(), content_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/openapi.json")
    def openapi() -> dict:
        return description

    @app.get("/v1/models")
    def list_models() -> dict:
        return {"object": "list", "data": [service.describe() for service in models.ready]}

    @app.get("/v1/models/<path:name>")
    def one_model(name: str) -> dict:
        return models.get(name).describe()


def _add_completions(app: "flask.Flask", models: Models) -> None:
    """The routes that make answers, and those to what is kept of them."""
    import flask

    def json_body() -> bytes:
        if not flask.request.is_json:
            raise ApiError(415, "send JSON, with 'Content-Type: application/json'")
        return flask.request.get_data(cache=False)

    def respond(completion: Completion, body: Any) -> flask.Response:
        about = {"stream": bool(body.stream), **({"user": body.user} if body.user else {})}
        flask.g.facts = completion.facts = about | completion.facts
        gone = flask.request.environ.get("waitress.client_disconnected", lambda: False)
        headers = {"X-Cache": "hit" if completion.cached else "miss"}
        deliveries = completion.deliveries(gone)
        try:
            if body.stream:
                headers |= {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
                include_usage = bool(body.stream_options and body.stream_options.include_usage)
                events = completion.answer.stream(deliveries, include_usage)
                response = flask.Response(events, mimetype="text/event-stream", headers=headers)
            else:
                for _ in deliveries:
                    pass
                if not completion.answer.ended:
                    raise ApiError(499, "the client has gone")
                response = flask.jsonify(completion.answer.whole())
                response.headers.update(headers)
        except BaseException:
            completion.close()
            raise
        response.call_on_close(completion.close)
        return response

    @app.post("/v1/chat/completions")
    def chat_completions() -> flask.Response:
        body = read_body(json_body(), ChatRequest)
        return respond(models.get(body.model).chat(body, flask.g.owner), body)

    @app.post("/v1/completions")
    def completions() -> flask.Response:
        body = read_body(json_body(), CompletionRequest)
        return respond(models.get(body.model).complete(body, flask.g.owner), body)

    @app.post("/cache/invalidate")
    def invalidate() -> dict:
        return models.invalidate()

    @app.route("/v1/sessions/<name>", methods=["GET", "DELETE"])
    def session(name: str) -> dict:
        return models.session(flask.g.owner, name, forget=flask.request.method == "DELETE")


def make_server(app: "flask.Flask", host: str, port: int, threads: int | None = None, **more: Any) -> Any:
    """A waitress server around `app`, bound but not yet running; `.run()` serves, `.effective_port` is its port.

    An answer holds a thread for as long as it is made: there are as many as answers may be open, and some for the
    rest, unless `threads` says otherwise. `more` is for waitress. Raises OSError when the address is taken.
    """
    import waitress

    threads = threads or app.extensions["models"].most_open + 8
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # who waits is in our own figures
    # with a lookahead of 1 waitress notices a client that leaves while its answer is being made
    return waitress.create_server(
        app,
        host=host,
        port=port,
        ipv4=":" not in host,  # one socket, though a name may have addresses of both kinds
        ipv6=":" in host,
        threads=threads,
        connection_limit=max(1000, 4 * threads),
        asyncore_use_poll=True,  # select() ends at 1,024 connections
        max_request_body_size=8 * app.config["MAX_CONTENT_LENGTH"],
        channel_request_lookahead=1,
        clear_untrusted_proxy_headers=True,
        **more,
    )


def drain(server: Any, models: Any, seconds: float) -> bool:
    """Refuse new work and wait until all that was begun is answered and sent; False when that took too long."""
    models.drain()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        channels = list(server.active_channels.values())
        if not models.n_open and not any(channel.requests or channel.total_outbufs_len for channel in channels):
            return True
        time.sleep(0.02)
    return False
