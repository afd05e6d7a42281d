"""The chat page and the OpenAI chat API over one engine: Flask under waitress.

Beyond the OpenAI format: when the model uses its calculator, the answer carries `tool_trace`, beside `content` and
never inside it: in a stream `delta.tool_trace` = {"expression": "37*48", "result": "1776"} at the place of the call
(result null when the expression was not valid), otherwise `message.tool_trace`, a list of the same. An assistant
message that is sent back may have as content the list of its parts, {"type": "text" | "python" | "python_output",
"text": ...}, so that the model also sees how it calculated.
"""

import json
import logging
import queue
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.engine import AnswerDecoder, Engine, Request, ToolCall, Update

if TYPE_CHECKING:
    import flask

log = logging.getLogger(__name__)

PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)
PARAMETERS = ("model", "messages", "stream", "temperature", "top_k", "max_tokens", "seed")
Delivery = tuple[int | None, str | None]  # a token, if the step brought one, and the reason of the end, if it ended


class ApiError(Exception):
    """An answer in OpenAI's error shape: `{"error": {"message", "type", "param", "code"}}`."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class EngineLoop:
    """The one thread that touches the engine. Handlers submit requests and read each one's deliveries from a queue."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: BaseException | None = None  # what killed the engine, if it is dead
        self._wake = threading.Condition()
        self._commands: list[tuple[Callable[[Request], None], Request]] = []
        self._queues: dict[Request, queue.SimpleQueue[Delivery]] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> "queue.SimpleQueue[Delivery]":
        """Queue a request; its deliveries appear in the result. Raises ValueError when its prompt is too long."""
        self.engine.check(request)
        with self._wake:
            if self._closed:
                raise ApiError(503, "the engine has stopped: see the server's log and restart it")
            deliveries = self._queues[request] = queue.SimpleQueue()
            self._commands.append((self.engine.add, request))
            self._wake.notify()
        return deliveries

    def cancel(self, request: Request) -> None:
        """Drop a request whose reader went away; nothing happens to one that has finished."""
        with self._wake:
            if self._queues.pop(request, None) is not None:
                self._commands.append((self.engine.abort, request))
                self._wake.notify()

    def close(self) -> None:
        """Stop after the current step; readers that still wait get the reason "error"."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._closed or self._commands or self.engine.busy)
                    if self._closed:
                        return
                    commands, self._commands = self._commands, []
                for command, request in commands:
                    command(request)
                self._deliver(self.engine.step())
        except Exception as error:
            log.exception("the engine died")
            self.error = error
        finally:
            with self._wake:
                self._closed = True
                for deliveries in self._queues.values():
                    deliveries.put((None, "error"))
                self._queues.clear()

    def _deliver(self, updates: list[Update]) -> None:
        with self._wake:
            for update in updates:
                if update.request in self._queues:
                    deliveries = self._queues[update.request]
                    for token in update.tokens:
                        deliveries.put((token, None))
                    if update.finish_reason is not None:
                        deliveries.put((None, update.finish_reason))
                        del self._queues[update.request]


def _number(
    body: dict[str, Any], name: str, kinds: type | tuple[type, ...], low: float, high: float, default: Any
) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        what = "an integer" if kinds is int else "a number"
        raise ApiError(400, f"'{name}' must be {what} from {low} to {high}", name)
    return value


def parse_request(body: Any, engine: Engine, model_name: str, temperature: float) -> tuple[Request, bool]:
    """A chat request's JSON body -> (engine request, stream or not). Raises ApiError for all that is not right."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    for name, value in body.items():
        if name not in PARAMETERS and value is not None:
            raise ApiError(400, f"'{name}' is not supported: this server knows {', '.join(PARAMETERS)}", name)
    if body.get("model") not in (None, model_name):
        raise ApiError(
            404, f"there is no model {body['model']!r}: this server has {model_name}", "model", "model_not_found"
        )
    if not isinstance(body.get("stream") or False, bool):
        raise ApiError(400, "'stream' must be true or false", "stream")
    max_tokens = _number(body, "max_tokens", int, 1, 2**31, None)
    settings = {
        "temperature": _number(body, "temperature", (int, float), 0, 2, temperature),
        "top_k": _number(body, "top_k", int, 0, 2**31, None),
        "seed": _number(body, "seed", int, -(2**63), 2**63, random.getrandbits(32)),
    }
    messages = body.get("messages")
    try:
        request = engine.chat_request({"messages": messages}, max_tokens, **settings)
        engine.check(request)
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from error
    if messages[-1]["role"] != "user":
        raise ApiError(400, "the last message must be the user's", "messages")
    return request, bool(body.get("stream"))


def create_app(
    engine: Engine, model_name: str = "nanochat", temperature: float = 0.0, max_body_bytes: int = 1 << 20
) -> "flask.Flask":
    """The application: `/`, `/health`, `/v1/models`, `/v1/chat/completions`. Starts the engine's thread.

    temperature: used when a request gives none. `app.extensions["engine_loop"].close()` stops the thread.
    """
    import flask
    from werkzeug.exceptions import HTTPException

    app = flask.Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = max_body_bytes
    loop = app.extensions["engine_loop"] = EngineLoop(engine)
    page = Path(__file__).with_name("ui.html").read_text(encoding="utf-8")
    created = int(time.time())

    @app.errorhandler(ApiError)
    def api_error(error: ApiError) -> tuple[dict, int]:
        return error.body, error.status

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> tuple[dict, int, dict]:
        allow = error.get_response().headers.get("Allow")
        body = ApiError(error.code or 500, error.description or error.name).body
        return body, error.code or 500, {"Allow": allow} if allow else {}

    @app.get("/")
    def index() -> flask.Response:
        return flask.Response(page, mimetype="text/html", headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/health")
    def health() -> tuple[dict, int]:
        return ({"status": "ok"}, 200) if loop.error is None else ({"status": "the engine died"}, 503)

    @app.get("/v1/models")
    def models() -> dict:
        model = {"id": model_name, "object": "model", "created": created, "owned_by": "nanochat"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions")
    def chat_completions() -> Any:
        request, stream = parse_request(flask.request.get_json(), engine, model_name, temperature)
        deliveries = loop.submit(request)
        gone = flask.request.environ.get("waitress.client_disconnected", lambda: False)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}
        events = _events(AnswerDecoder(engine.tokenizer), deliveries, gone)
        if stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            response = flask.Response(_stream(head, events, request), mimetype="text/event-stream", headers=headers)
        else:
            response = flask.jsonify(_complete(head, events, request))
        response.call_on_close(lambda: loop.cancel(request))
        return response

    return app


def _events(
    decoder: AnswerDecoder, deliveries: "queue.SimpleQueue[Delivery]", gone: Callable[[], bool]
) -> Iterator[str | ToolCall]:
    """An answer's text and tool calls as they come; ends early when the client has gone."""
    reason = None
    while reason is None:
        try:
            token, reason = deliveries.get(timeout=0.25)
        except queue.Empty:
            token = None
        if gone():
            return
        if token is not None:
            yield from decoder.feed(token)
    if reason == "error":
        raise ApiError(503, "the engine stopped in the middle of the answer")
    yield from decoder.finish()


def _stream(head: dict[str, Any], events: Iterator[str | ToolCall], request: Request) -> Iterator[str]:
    """Server-sent events: the role, pieces of the answer, the reason of its end, [DONE]; or an error in words."""

    def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"

    try:
        yield chunk({"role": "assistant", "content": ""})
        for event in events:
            yield chunk({"content": event} if isinstance(event, str) else {"tool_trace": event._asdict()})
        yield chunk({}, request.finish_reason)
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"


def _complete(head: dict[str, Any], events: Iterator[str | ToolCall], request: Request) -> dict[str, Any]:
    events = list(events)
    message = {"role": "assistant", "content": "".join(event for event in events if isinstance(event, str))}
    if trace := [event._asdict() for event in events if isinstance(event, ToolCall)]:
        message["tool_trace"] = trace
    n_prompt, n_new = len(request.tokens), len(request.output)
    usage = {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}
    choice = {"index": 0, "message": message, "finish_reason": request.finish_reason}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage}


def make_server(app: "flask.Flask", host: str, port: int, threads: int = 64) -> Any:
    """A waitress server around `app`, bound but not yet running; `.run()` serves, `.effective_port` is its port.

    A stream holds a thread for as long as it lasts, so `threads` is the number of clients served at once.
    Raises OSError when the address is taken.
    """
    import waitress

    # with a lookahead of 1 waitress notices a client that leaves while its answer is being made
    return waitress.create_server(
        app,
        host=host,
        port=port,
        ipv4=":" not in host,  # one socket, though a name may have addresses of both kinds
        ipv6=":" in host,
        threads=threads,
        connection_limit=4 * threads,
        max_request_body_size=8 * app.config["MAX_CONTENT_LENGTH"],
        channel_request_lookahead=1,
        clear_untrusted_proxy_headers=True,
    )
