"""Routes about the server itself: the chat page, health, metrics, models, sessions, and /openapi.json.

`OPERATIONS` lists all routes, those of app.py included. /openapi.json is made of it, so that a route's types and its
documentation cannot drift apart.
"""

import base64
import hashlib
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import flask
from prometheus_client import generate_latest
from pydantic import TypeAdapter

from nanochat.serve.loop import Model
from nanochat.serve.objects import ChatCompletion, ModelInfo, SessionContent, TextCompletion
from nanochat.serve.schema import ApiError, ChatRequest, CompletionRequest, Parameters

information = flask.Blueprint("information", __name__)


@information.get("/")
def page() -> flask.Response:
    """Send the chat page, with a Content-Security-Policy that lets only its own script and style run in it."""
    # It is one file without anything from other machines, so that it works on a laptop without a network.
    html = Path(__file__).with_name("ui.html").read_text(encoding="utf-8")

    # The page shows what a model wrote. Should markup ever get through, a browser runs only scripts with these hashes.
    def hashes(tag: str) -> str:
        sources = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = [hashlib.sha256(source.encode()).digest() for source in sources]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    response = flask.Response(html, mimetype="text/html")
    response.headers["Content-Security-Policy"] = (
        f"default-src 'none'; style-src {hashes('style')}; script-src {hashes('script')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return response


@information.get("/health")
def health() -> tuple[dict, int]:
    """Say whether this server should get requests; 503 takes it out of a load balancer's rotation."""
    models = flask.g.models
    # One living replica is enough: at 503 a load balancer would send nothing to the others, either.
    dead = [model.name for model in models.loaded if not model.living_replicas]
    if dead:
        return {"status": f"the engine died: {', '.join(dead)}"}, 503
    if models.draining.is_set():
        return {"status": "shutting down"}, 503
    if len(models.loaded) < len(models.names):
        return {"status": "loading"}, 503
    return {"status": "ok"}, 200


@information.get("/stats")
def stats() -> dict:
    """Return gauges and counters of each model, summed over its replicas."""
    models = flask.g.models
    figures = {}
    for model in models.loaded:
        figures[model.name] = {
            "context": model.engine.context,
            "max_batch": model.engine.max_batch,
            "open_requests": model.n_open,
            "sessions": len(model.sessions),
            "cached_responses": len(model.responses),
            **models.metrics.engine_figures(model.name),
        }
    return {"uptime_seconds": round(time.time() - models.started, 1), "models": figures}


@information.get("/metrics")
def metrics() -> flask.Response:
    """Return counters and histograms in Prometheus' text format."""
    text = generate_latest(flask.g.models.metrics.registry)
    return flask.Response(text, content_type="text/plain; version=0.0.4; charset=utf-8")


@information.get("/openapi.json")
def openapi() -> dict:
    """Return the description of all routes."""
    return describe()


@information.get("/v1/models")
def list_models() -> dict:
    """List the models that answer here."""
    return {"object": "list", "data": [model_info(model) for model in flask.g.models.loaded]}


@information.get("/v1/models/<path:name>")
def one_model(name: str) -> ModelInfo:
    """Describe one model."""
    return model_info(flask.g.models.get(name))


def model_info(model: Model) -> ModelInfo:
    """Return a model's entry in /v1/models."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "nanochat",
        "context_length": model.engine.context,
    }


@information.get("/v1/sessions/<name>")
def get_session(name: str) -> SessionContent:
    """Return what a session holds. Raises ApiError 404 if there is none of that name."""
    # Each model keeps its own sessions; the most recent one of that name is meant.
    found = [model.sessions.get((flask.g.owner, name)) for model in flask.g.models.loaded]
    sessions = [session for session in found if session is not None]
    if not sessions:
        raise no_session(name)
    return max(sessions, key=lambda session: session["expires_in"])


@information.delete("/v1/sessions/<name>")
def delete_session(name: str) -> dict:
    """End a session. Raises ApiError 404 if there is none of that name."""
    # The session goes in all models that have one of that name, so all are asked before `any` looks.
    deleted = [model.sessions.forget((flask.g.owner, name)) for model in flask.g.models.loaded]
    if not any(deleted):
        raise no_session(name)
    return {"id": name, "deleted": True}


def no_session(name: str) -> ApiError:
    """Return the refusal for a session that is not there."""
    return ApiError(404, f"there is no session {name!r} (any more)", "session_id", "session_not_found")


@information.post("/cache/invalidate")
def invalidate() -> dict:
    """Empty the response caches and the prefix caches of all models."""
    models = flask.g.models.loaded
    # A prefix cache belongs to its engine's thread, so the loop empties it before its next step.
    for model in models:
        for loop in model.living_replicas:
            loop.forget_prefixes()
    return {"responses": sum(model.responses.clear() for model in models)}


# ---- /openapi.json


class Operation(NamedTuple):
    """A route, as /openapi.json describes it. `answer` and `body` are types; pydantic makes JSON schemas of them."""

    method: str
    path: str
    summary: str
    answer: Any
    media: str = "application/json"
    body: type[Parameters] | None = None


OPERATIONS = (
    Operation("get", "/", "The chat page", str, media="text/html"),
    Operation("get", "/health", "Should this server get requests?", dict[str, str]),
    Operation("get", "/stats", "The state of all models, for people", dict[str, Any]),
    Operation("get", "/metrics", "Counters and histograms for Prometheus", str, media="text/plain"),
    Operation("get", "/openapi.json", "This description", dict[str, Any]),
    Operation("get", "/v1/models", "The models that answer here", dict[str, Any]),
    Operation("get", "/v1/models/{name}", "One model", ModelInfo),
    Operation("post", "/v1/chat/completions", "The next answer of a chat", ChatCompletion, body=ChatRequest),
    Operation("post", "/v1/completions", "The continuation of a text", TextCompletion, body=CompletionRequest),
    Operation("get", "/v1/sessions/{name}", "What a session holds", SessionContent),
    Operation("delete", "/v1/sessions/{name}", "End a session", dict[str, Any]),
    Operation("post", "/cache/invalidate", "Empty the response cache and the prefix caches", dict[str, int]),
)
# Any route may answer with these, because keys, bodies and models are checked the same way everywhere.
REFUSALS = {
    400: "a parameter is wrong or not supported; the error names it",
    401: "no valid API key",
    403: "the server has no keys, and was asked for by a name that is not its own",
    404: "no such model, session or path",
    409: "the session is answering",
    413: "the body is too long",
    415: "the body is not JSON",
    429: "too many answers are waited for: come back after Retry-After seconds",
    500: "the model's numbers are not finite: its weights are damaged",
    503: "the engine has died, the model is being loaded, or the server is shutting down",
}


def describe() -> dict[str, Any]:
    """Return the OpenAPI 3.1 description of the server."""
    wanted: list[Any] = [(route, "serialization", TypeAdapter(route.answer)) for route in OPERATIONS]
    wanted += [(route, "validation", TypeAdapter(route.body)) for route in OPERATIONS if route.body is not None]
    # All schemas are asked for together: then types that several of them use are described once, under "components".
    schemas, definitions = TypeAdapter.json_schemas(wanted, ref_template="#/components/schemas/{model}")
    refusal = {"application/json": {"schema": {"type": "object", "required": ["error"]}}}
    paths: dict[str, Any] = {}
    for route in OPERATIONS:
        content: dict[str, Any] = {route.media: {"schema": schemas[route, "serialization"]}}
        described: dict[str, Any] = {"summary": route.summary, "operationId": f"{route.method} {route.path}"}
        if route.body is not None:
            # The routes that take a body make answers, and those may be streamed.
            event = {"type": "object", "properties": {"data": {"type": "string"}}}
            content["text/event-stream"] = {"schema": event}
            taken = {"application/json": {"schema": schemas[route, "validation"]}}
            described["requestBody"] = {"required": True, "content": taken}
        if "{name}" in route.path:
            a_name = {"type": "string", "minLength": 1}
            described["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": a_name}]
        responses = {"200": {"description": route.summary, "content": content}}
        if route.path == "/health":
            # Load balancers have no key, and 503 from here is an answer, not a refusal.
            described["security"] = []
            responses["503"] = {"description": REFUSALS[503], "content": content}
        else:
            for status, meaning in REFUSALS.items():
                responses[str(status)] = {"description": meaning, "content": refusal}
        described["responses"] = responses
        paths.setdefault(route.path, {})[route.method] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "nanochat", "version": "1"},
        # {}: without --api-keys no key is needed. "password" is what a browser's own dialog sends (app.py).
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
