"""The HTTP server: the chat page and the OpenAI API, as a Flask application under waitress.

A chat request goes straight down from here:

    chat_completions()         reads and checks the body (schema.py),
      model.sessions.begin()   puts the session's conversation before it (sessions.py),
      chat_format.prompt()     renders it to token ids (chat_format.py),
      model.submit()           hands it to an engine's thread (loop.py),
        engine.step()          samples its tokens (nanochat/engine.py);
    Answer                     brings them back as OpenAI's objects (answers.py).

What holds for all routes (keys, origins, the access log) and the server around them are in server.py.
"""

import base64
import hashlib
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter

from nanochat.chat_format import ChatFormat
from nanochat.conversation import Message
from nanochat.detokenizer import AnswerDecoder
from nanochat.engine import Engine, Request
from nanochat.serve.answers import Answer, ChatForm, TextForm
from nanochat.serve.loop import Model, Models, ServerConfig
from nanochat.serve.schema import (
    ApiError,
    ChatCompletion,
    ChatRequest,
    CompletionRequest,
    ModelInfo,
    Parameters,
    SessionContent,
    TextCompletion,
    read_body,
)
from nanochat.serve.server import add_policy

if TYPE_CHECKING:
    import flask


def create_app(
    engine: Engine,
    model_name: str = "nanochat",
    config: ServerConfig | None = None,
    chat_format: ChatFormat | None = None,
) -> "flask.Flask":
    """Return the application over one engine; server.make_server serves it, any WSGI server can.

    chat_format: None means the project's own. `app.extensions["models"].close()` ends the engine's thread.
    """
    models = Models(config or ServerConfig(), [model_name])
    models.add(model_name, [engine], chat_format or ChatFormat(engine.tokenizer))
    return create_app_for(models)


def create_app_for(models: Models) -> "flask.Flask":
    """Return the application over several models, which may still be loading. Raises ValueError for bad API keys."""
    import flask

    app = flask.Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = models.config.max_body
    app.extensions["models"] = models
    add_policy(app, models)
    _add_information(app, models)
    _add_completions(app, models)
    return app


# ---- Routes that tell of the server


class Operation(NamedTuple):
    """A route, as /openapi.json describes it. `answer` is a type, or a media type for text; `body` is a request's."""

    method: str
    path: str
    summary: str
    answer: Any
    body: type[Parameters] | None = None


OPERATIONS = (
    Operation("get", "/", "The chat page", "text/html"),
    Operation("get", "/health", "Should this server get requests?", dict[str, str]),
    Operation("get", "/stats", "The state of all models, for people", dict[str, Any]),
    Operation("get", "/metrics", "Counters and histograms for Prometheus", "text/plain"),
    Operation("get", "/openapi.json", "This description", dict[str, Any]),
    Operation("get", "/v1/models", "The models that answer here", dict[str, Any]),
    Operation("get", "/v1/models/{name}", "One model", ModelInfo),
    Operation("post", "/v1/chat/completions", "The next answer of a chat", ChatCompletion, ChatRequest),
    Operation("post", "/v1/completions", "The continuation of a text", TextCompletion, CompletionRequest),
    Operation("get", "/v1/sessions/{name}", "What a session holds", SessionContent),
    Operation("delete", "/v1/sessions/{name}", "End a session", dict[str, Any]),
    Operation("post", "/cache/invalidate", "Empty the response cache and the prefix caches", dict[str, int]),
)
REFUSALS = {
    400: "a parameter is wrong or not supported; the error names it",
    401: "no valid API key",
    404: "no such model, session or path",
    409: "the session is answering",
    413: "the body is too long",
    415: "the body is not JSON",
    429: "too many answers are waited for: come back after Retry-After seconds",
    503: "the engine has died, the model is being loaded, or the server is shutting down",
}


def describe() -> dict[str, Any]:
    """Return the OpenAPI 3.1 description of the server; pydantic makes the schemas from the types in OPERATIONS."""
    wanted: list[Any] = []
    for operation in OPERATIONS:
        if not isinstance(operation.answer, str):
            wanted.append((f"answer of {operation.method} {operation.path}", "serialization", operation.answer))
        if operation.body is not None:
            wanted.append((f"body of {operation.path}", "validation", operation.body))
    schemas, definitions = TypeAdapter.json_schemas(
        [(key, mode, TypeAdapter(kind)) for key, mode, kind in wanted],
        ref_template="#/components/schemas/{model}",
    )
    by_key = {key: schema for (key, _), schema in schemas.items()}
    paths: dict[str, Any] = {}
    for method, path, summary, answer, body in OPERATIONS:
        if isinstance(answer, str):
            content: dict[str, Any] = {answer: {"schema": {"type": "string"}}}
        else:
            content = {"application/json": {"schema": by_key[f"answer of {method} {path}"]}}
        operation_object: dict[str, Any] = {"summary": summary, "operationId": f"{method} {path}"}
        if body is not None:
            event = {"type": "object", "properties": {"data": {"type": "string"}}}
            content["text/event-stream"] = {"schema": event}
            taken = {"application/json": {"schema": by_key[f"body of {path}"]}}
            operation_object["requestBody"] = {"required": True, "content": taken}
        if "{name}" in path:
            name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            operation_object["parameters"] = [name]
        responses: dict[str, Any] = {"200": {"description": summary, "content": content}}
        for status, meaning in REFUSALS.items():
            refusal = {"application/json": {"schema": {"type": "object", "required": ["error"]}}}
            responses[str(status)] = {"description": meaning, "content": refusal}
        if path == "/health":
            responses = {"200": responses["200"], "503": {"description": REFUSALS[503], "content": content}}
            operation_object["security"] = []
        operation_object["responses"] = responses
        paths.setdefault(path, {})[method] = operation_object
    return {
        "openapi": "3.1.0",
        "info": {"title": "nanochat", "version": "1"},
        "security": [{}, {"bearer": []}, {"password": []}],
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "password": {"type": "http", "scheme": "basic"},
            },
        },
    }


def _page_and_policy() -> tuple[str, str]:
    """Read the chat page, and make a Content-Security-Policy that lets only its own script and style run in it."""
    page = Path(__file__).with_name("ui.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        sources = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [hashlib.sha256(source.encode()).digest() for source in sources]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    directives = [
        "default-src 'none'",
        f"style-src {hashes('style')}",
        f"script-src {hashes('script')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return page, "; ".join(directives)


def _add_information(app: "flask.Flask", models: Models) -> None:
    """Add the page, and the routes that tell of the server and of what it keeps."""
    import flask

    page, content_security_policy = _page_and_policy()
    description = describe()

    @app.get("/")
    def index() -> flask.Response:
        headers = {"Content-Security-Policy": content_security_policy}
        return flask.Response(page, mimetype="text/html", headers=headers)

    @app.get("/health")
    def health() -> tuple[dict, int]:
        return {"status": models.trouble or "ok"}, 503 if models.trouble else 200

    @app.get("/stats")
    def stats() -> dict:
        figures = {model.name: model.stats() for model in models.loaded}
        return {"uptime_seconds": round(time.time() - models.started, 1), "models": figures}

    @app.get("/metrics")
    def metrics() -> flask.Response:
        return flask.Response(models.metrics.text(), content_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/openapi.json")
    def openapi() -> dict:
        return description

    @app.get("/v1/models")
    def list_models() -> dict:
        return {"object": "list", "data": [model.describe() for model in models.loaded]}

    @app.get("/v1/models/<path:name>")
    def one_model(name: str) -> ModelInfo:
        return models.get(name).describe()

    @app.get("/v1/sessions/<name>")
    def get_session(name: str) -> SessionContent:
        return models.find_session(flask.g.owner, name)

    @app.delete("/v1/sessions/<name>")
    def delete_session(name: str) -> dict:
        models.delete_session(flask.g.owner, name)
        return {"id": name, "deleted": True}

    @app.post("/cache/invalidate")
    def invalidate() -> dict:
        return {"responses": models.invalidate_caches()}


# ---- Routes that make answers


def _add_completions(app: "flask.Flask", models: Models) -> None:
    import flask

    @app.post("/v1/chat/completions")
    def chat_completions() -> flask.Response:
        body = read_body(json_body(), ChatRequest)
        model = models.get_for_answer(body.model)
        messages = [message.as_turn() for message in body.messages]
        session = None
        if body.session_id is not None:
            session = model.sessions.begin((flask.g.owner, body.session_id), messages)
            messages = session.messages
        try:
            requests = chat_requests(model, body, messages, models.config)
            key = cache_key(model, body, requests, [ChatForm.id_prefix, flask.g.owner, messages])
            with_logprobs = body.top_logprobs_wanted() is not None
            answer = Answer(ChatForm(), model, requests, with_logprobs, key, session)
        except BaseException:
            if session is not None:
                session.end()
            raise
        return respond(answer, body)

    @app.post("/v1/completions")
    def text_completions() -> flask.Response:
        body = read_body(json_body(), CompletionRequest)
        model = models.get_for_answer(body.model)
        requests = text_requests(model, body, models.config)
        key = cache_key(model, body, requests, [TextForm.id_prefix, flask.g.owner])
        answer = Answer(TextForm(), model, requests, body.top_logprobs_wanted() is not None, key)
        return respond(answer, body)

    def json_body() -> bytes:
        if not flask.request.is_json:
            raise ApiError(415, "send JSON, with 'Content-Type: application/json'")
        return flask.request.get_data(cache=False)

    def cache_key(model: Model, body: Parameters, requests: Sequence[Request], context: list[Any]) -> str | None:
        """Return the key of an answer that is sure to repeat, else None. context: what decides it besides the body."""
        repeats = body.seed is not None or requests[0].temperature == 0
        if not repeats or not models.config.cache_mb:
            return None
        asked = body.model_dump(exclude={"stream", "stream_options", "user", "session_id", "model"})
        return model.responses.key([asked, *context])

    def respond(answer: Answer, body: Parameters) -> flask.Response:
        """Send an answer, whole or streamed; whatever becomes of it, it is closed."""
        answer.facts["stream"] = bool(body.stream)
        if body.user:
            answer.facts["user"] = body.user
        flask.g.facts = answer.facts
        client_left = flask.request.environ.get("waitress.client_disconnected", lambda: False)
        try:
            if body.stream:
                include_usage = bool(body.stream_options and body.stream_options.include_usage)
                events = answer.stream(client_left, include_usage)
                response = flask.Response(events, mimetype="text/event-stream")
                response.headers["Cache-Control"] = "no-cache"
                response.headers["X-Accel-Buffering"] = "no"  # nginx would hold events back until it has a page full
            else:
                for _ in answer.deliveries(client_left):
                    pass
                if not answer.finished:
                    raise ApiError(499, "the client has left")  # for the access log alone
                response = flask.jsonify(answer.whole())
        except BaseException:
            answer.close()
            raise
        response.headers["X-Cache"] = "miss" if answer.kept is None else "hit"
        response.call_on_close(answer.close)
        return response


def chat_requests(model: Model, body: ChatRequest, messages: list[Message], config: ServerConfig) -> list[Request]:
    """Return `n` engine requests for the next answer of a chat. Raises ApiError 400 if it cannot be made."""
    limit = longest_answer(body, config)
    sampling = body.sampling(model.engine.vocab_size, config.temperature)
    check_number(model, body.n or 1)
    try:
        prompt = model.chat_format.prompt(messages, model.engine.context, limit)
        requests = [Request(prompt, limit, sample=i, **sampling) for i in range(body.n or 1)]
        for request in requests:
            model.engine.check(request)
            request.decoder = model.chat_format.decoder(prompt, request.stop)
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from error
    return requests


def text_requests(model: Model, body: CompletionRequest, config: ServerConfig) -> list[Request]:
    """Return `n` engine requests for each prompt of the body. Raises ApiError 400 if one cannot be run."""
    limit = longest_answer(body, config)
    sampling = body.sampling(model.engine.vocab_size, config.temperature)
    prompts = body.prompts()
    check_number(model, len(prompts) * (body.n or 1))
    bos = model.tokenizer.get_bos_token_id()
    requests = []
    try:
        for prompt in prompts:
            if isinstance(prompt, str):
                prompt = [*([] if bos is None else [bos]), *model.tokenizer.encode(prompt)]
            for i in range(body.n or 1):
                request = Request(prompt, limit, sample=i, **sampling)
                model.engine.check(request)
                request.decoder = AnswerDecoder(model.tokenizer, request.stop)  # a continued text has no reasoning
                requests.append(request)
    except ValueError as error:
        raise ApiError(400, str(error), "prompt") from error
    return requests


def longest_answer(body: Parameters, config: ServerConfig) -> int | None:
    """Return the smaller of the request's and the server's limits; None means to the end of the context."""
    limits = [limit for limit in (body.token_limit(), config.max_tokens) if limit is not None]
    return min(limits, default=None)


def check_number(model: Model, n: int) -> None:
    """Raise ApiError 400 for more answers than can ever be open at once, before any prompt is tokenized."""
    limit = model.replicas[0].limit
    if n > limit:
        raise ApiError(400, f"{n} answers at once: this server makes at most {limit}", "n")
