"""Routes that tell of the server: the chat page, its health, its figures, its models and sessions, its description.

`OPERATIONS` lists all routes, those of app.py included. /openapi.json is made of it, so that a route's types and its
documentation cannot drift apart.
"""

import base64
import hashlib
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter

from nanochat.serve.models import Models
from nanochat.serve.schema import (
    ApiError,
    ChatCompletion,
    ChatRequest,
    CompletionRequest,
    ModelInfo,
    Parameters,
    SessionContent,
    TextCompletion,
)

if TYPE_CHECKING:
    import flask


def add_information(app: "flask.Flask", models: Models) -> None:
    """Add the page, and the routes that tell of the server and of what it keeps."""
    import flask

    # Made once, when the server starts: neither changes while it runs.
    page, content_security_policy = _page_and_policy()
    description = describe()

    @app.get("/")
    def index() -> flask.Response:
        headers = {"Content-Security-Policy": content_security_policy}
        return flask.Response(page, mimetype="text/html", headers=headers)

    @app.get("/health")
    def health() -> tuple[dict, int]:
        trouble = models.trouble
        return {"status": trouble or "ok"}, 503 if trouble else 200

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
        # Each model keeps its own sessions; the most recent one of that name is meant.
        found = [model.sessions.get((flask.g.owner, name)) for model in models.loaded]
        sessions = [session for session in found if session is not None]
        if not sessions:
            raise no_session(name)
        return max(sessions, key=lambda session: session["expires_in"])

    @app.delete("/v1/sessions/<name>")
    def delete_session(name: str) -> dict:
        # The session goes in all models that have one of that name, so all are asked before `any` looks.
        deleted = [model.sessions.forget((flask.g.owner, name)) for model in models.loaded]
        if not any(deleted):
            raise no_session(name)
        return {"id": name, "deleted": True}

    @app.post("/cache/invalidate")
    def invalidate() -> dict:
        for model in models.loaded:
            for loop in model.alive:
                loop.forget_prefixes()
        return {"responses": sum(model.responses.clear() for model in models.loaded)}

    def no_session(name: str) -> ApiError:
        return ApiError(404, f"there is no session {name!r} (any more)", "session_id", "session_not_found")


def _page_and_policy() -> tuple[str, str]:
    """Read the chat page, and make a Content-Security-Policy that lets only its own script and style run in it."""
    page = Path(__file__).with_name("ui.html").read_text(encoding="utf-8")

    # The page shows what a model wrote. Should markup ever get through, a browser runs only scripts with these hashes.
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


# ---- /openapi.json


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
    # All schemas are asked for together: then types that several of them use are described once, under "components".
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
        # The routes that take a body make answers, and those may be streamed.
        if body is not None:
            event = {"type": "object", "properties": {"data": {"type": "string"}}}
            content["text/event-stream"] = {"schema": event}
            taken = {"application/json": {"schema": by_key[f"body of {path}"]}}
            operation_object["requestBody"] = {"required": True, "content": taken}
        if "{name}" in path:
            operation_object["parameters"] = [
                {
                    "name": "name",
                    "in": "path",
                    "required": True,
                    "schema": {"type": "string", "minLength": 1},
                }
            ]
        responses: dict[str, Any] = {"200": {"description": summary, "content": content}}
        for status, meaning in REFUSALS.items():
            refusal = {"application/json": {"schema": {"type": "object", "required": ["error"]}}}
            responses[str(status)] = {"description": meaning, "content": refusal}
        # Load balancers have no key, and 503 from here is an answer, not a refusal.
        if path == "/health":
            responses = {"200": responses["200"], "503": {"description": REFUSALS[503], "content": content}}
            operation_object["security"] = []
        operation_object["responses"] = responses
        paths.setdefault(path, {})[method] = operation_object
    return {
        "openapi": "3.1.0",
        "info": {"title": "nanochat", "version": "1"},
        # {}: without --api-keys no key is needed. "password" is what a browser's own dialog sends (server.py).
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
