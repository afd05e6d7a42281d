"""The server's description of itself (OpenAPI 3.1): requests from the types that check them, answers by their keys."""

from typing import Any

from pydantic.json_schema import models_json_schema

from nanochat.serve.schema import ChatRequest, CompletionRequest

REFUSALS = {
    400: "a parameter is wrong or not supported; the error names it",
    401: "no valid API key",
    404: "no such model, session or path",
    409: "the session is answering",
    413: "the body is too long",
    415: "the body is not JSON",
    429: "too many answers are waited for: come back after Retry-After seconds",
    502: "the replica that made the answer has ended: ask again",
    503: "the engine has died, the model is being loaded, or the server is shutting down",
}
EXAMPLES: dict[Any, Any] = {
    ChatRequest: {"messages": [{"role": "user", "content": "What is 37*48?"}], "max_tokens": 64},
    CompletionRequest: {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0},
}
MAKING = (400, 404, 413, 415, 429, 502, 503)
COMPLETION = ("id", "object", "created", "model", "choices", "usage")
MODEL = ("id", "object", "created", "owned_by", "context_length")
SESSION = ("id", "model", "turns", "dropped_turns", "tokens", "context", "expires_in", "cached_tokens", "messages")
# method, path, what it is, what its answer has (or its media type, where that is text), refusals, the type of its body
OPERATIONS: tuple[tuple[str, str, str, tuple[str, ...] | str, tuple[int, ...], Any], ...] = (
    ("get", "/", "The chat page", "text/html", (), None),
    ("get", "/health", "Whether the engine lives", ("status",), (), None),
    ("get", "/stats", "The state of everything", ("uptime_seconds", "models"), (), None),
    ("get", "/metrics", "Counters and times for Prometheus", "text/plain", (), None),
    ("get", "/openapi.json", "This description", ("openapi", "paths"), (), None),
    ("get", "/v1/models", "The models that answer here", ("object", "data"), (), None),
    ("get", "/v1/models/{name}", "One model", MODEL, (404, 503), None),
    ("post", "/v1/chat/completions", "The next answer of a chat", COMPLETION, (*MAKING, 409), ChatRequest),
    ("post", "/v1/completions", "Text continued", COMPLETION, MAKING, CompletionRequest),
    ("get", "/v1/sessions/{name}", "What a session holds", SESSION, (404,), None),
    ("delete", "/v1/sessions/{name}", "End a session", ("id", "deleted"), (404,), None),
    ("post", "/cache/invalidate", "Forget kept answers and known beginnings of prompts", ("responses",), (503,), None),
)


def _json(*required: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"type": "object", "required": list(required)}}}


def describe(title: str) -> dict[str, Any]:
    """The content of /openapi.json."""
    reference = "#/components/schemas/{model}"
    _, schemas = models_json_schema([(kind, "validation") for kind in EXAMPLES], ref_template=reference)
    paths: dict[str, Any] = {}
    for method, path, summary, answer, refusals, body in OPERATIONS:
        content = {answer: {"schema": {"type": "string"}}} if isinstance(answer, str) else _json(*answer)
        operation: dict[str, Any] = {"summary": summary, "operationId": f"{method} {path}"}
        if body is not None:
            event = {"type": "object", "properties": {"data": {"type": "string"}}}
            content |= {"text/event-stream": {"schema": event}}
            taken = {"schema": {"$ref": reference.format(model=body.__name__)}, "example": EXAMPLES[body]}
            operation["requestBody"] = {"required": True, "content": {"application/json": taken}}
        if "{name}" in path:
            name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            operation["parameters"] = [name]
        answers = {"200": {"description": summary, "content": content}}
        for status in (401, *refusals):
            answers[str(status)] = {"description": REFUSALS[status], "content": _json("error")}
        if path == "/health":
            answers = {"200": answers["200"], "503": {"description": REFUSALS[503], "content": _json("status")}}
            operation["security"] = []
        paths.setdefault(path, {})[method] = {**operation, "responses": answers}
    keys = {"key": {"type": "http", "scheme": "bearer"}, "password": {"type": "http", "scheme": "basic"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": "1"},
        "security": [{}, *({name: []} for name in keys)],
        "paths": paths,
        "components": {"schemas": schemas["$defs"], "securitySchemes": keys},
    }
