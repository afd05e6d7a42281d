"""The server's description of itself, OpenAPI 3.1: requests from the types that check them, answers from here."""

from typing import Any

from pydantic.json_schema import models_json_schema

from nanochat.api import ChatRequest, CompletionRequest, ToolTrace

REFUSALS = {
    400: "a parameter is wrong or not supported; the error names it",
    401: "no valid API key",
    404: "no such model, session or path",
    405: "not this method",
    409: "the session is answering",
    413: "the body is too long",
    415: "the body is not JSON",
    429: "too many answers are waited for: come back after Retry-After seconds",
    503: "the engine has died, or the server is shutting down",
}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """Schema of an object; null among a property's types means that it may be so."""
    return {"type": "object", "properties": {**required, **optional}, "required": list(required)}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


TEXT, COUNT, NUMBER, FLAG = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))
MAYBE_TEXT, MAYBE_OBJECT = {"type": ["string", "null"]}, {"type": ["object", "null"]}


def _answers() -> dict[str, Any]:
    """Schemas of what is given."""
    traces = _list(_ref("ToolTrace"))
    session = {"id": TEXT, "turns": COUNT, "dropped_turns": COUNT, "tokens": COUNT, "context": COUNT}
    session |= {"expires_in": NUMBER}
    message = _object({"role": {"const": "assistant"}, "content": TEXT}, tool_trace=traces)
    ending = {"index": COUNT, "finish_reason": {"enum": ["stop", "length"]}, "logprobs": MAYBE_OBJECT}
    cached = _object({"cached_tokens": COUNT})
    usage = {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT, "prompt_tokens_details": cached}
    head = {"id": TEXT, "created": COUNT, "model": TEXT, "usage": _object(usage)}
    error = {"message": TEXT, "type": TEXT, "param": MAYBE_TEXT, "code": MAYBE_TEXT}
    model = {"id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT, "context_length": COUNT}
    return {
        "Error": _object({"error": _object(error)}),
        "Session": _object({**session, "messages": _list({"type": "object"})}),
        "ChatCompletion": _object(
            {**head, "object": {"const": "chat.completion"}, "choices": _list(_object({**ending, "message": message}))},
            session=_object(session),
        ),
        "Completion": _object(
            {
                **head,
                "object": {"const": "text_completion"},
                "choices": _list(_object({**ending, "text": TEXT}, tool_trace=traces)),
            }
        ),
        "Model": _object(model),
    }


def _operation(
    name: str, summary: str, answer: Any, refusals: tuple[int, ...] = (), body: str | None = None, **more: Any
) -> dict[str, Any]:
    """One method of one path. answer: a schema in JSON, or the media type of text."""
    content = {answer: {"schema": TEXT}} if isinstance(answer, str) else {"application/json": {"schema": answer}}
    if body is not None:
        content |= {"text/event-stream": {"schema": TEXT}}
        more["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
    answers = {"200": {"description": summary, "content": content}}
    for status in (401, *refusals):
        wrong = {"application/json": {"schema": _ref("Error")}}
        answers[str(status)] = {"description": REFUSALS[status], "content": wrong}
    return {"operationId": name, "summary": summary, "responses": answers, **more}


def describe(model_name: str) -> dict[str, Any]:
    """The content of /openapi.json."""
    kinds = [(kind, "validation") for kind in (ChatRequest, CompletionRequest, ToolTrace)]
    _, taken = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    making = (400, 404, 413, 415, 429, 503)
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    status = _object({"status": TEXT})
    health = _operation("health", "Whether the engine lives", status, security=[])
    del health["responses"]["401"]
    health["responses"]["503"] = {
        "description": REFUSALS[503],
        "content": {"application/json": {"schema": status}},
    }
    invalidated = _object({"responses": COUNT})
    deleted = _object({"id": TEXT, "deleted": FLAG})
    models = _object({"object": {"const": "list"}, "data": _list(_ref("Model"))})
    paths = {
        "/": {"get": _operation("page", "The chat page", "text/html")},
        "/health": {"get": health},
        "/stats": {"get": _operation("stats", "The state of everything", {"type": "object"})},
        "/metrics": {"get": _operation("metrics", "Counters and times for Prometheus", "text/plain")},
        "/openapi.json": {"get": _operation("openapi", "This description", {"type": "object"})},
        "/v1/models": {"get": _operation("models", "The models that answer here", models)},
        "/v1/models/{name}": {"get": _operation("model", "One model", _ref("Model"), (404,), parameters=[name])},
        "/v1/chat/completions": {
            "post": _operation(
                "chat", "The next answer of a chat", _ref("ChatCompletion"), (*making, 409), "ChatRequest"
            )
        },
        "/v1/completions": {
            "post": _operation("complete", "Text continued", _ref("Completion"), making, "CompletionRequest")
        },
        "/v1/sessions/{name}": {
            "get": _operation("session", "What a session holds", _ref("Session"), (404,), parameters=[name]),
            "delete": _operation("forget", "End a session", deleted, (404,), parameters=[name]),
        },
        "/cache/invalidate": {"post": _operation("invalidate", "Forget kept answers and prefixes", invalidated)},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": model_name, "version": "1"},
        "security": [{}, {"key": []}, {"password": []}],
        "paths": paths,
        "components": {
            "schemas": {**taken["$defs"], **_answers()},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "password": {"type": "http", "scheme": "basic", "description": "the password is an API key"},
            },
        },
    }
