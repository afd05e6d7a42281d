"""The HTTP server: the chat page and the OpenAI API, as a Flask application under waitress.

This file follows a request. Flask calls `begin_request` before the route and `end_request` after it, whichever route it
is. A chat then goes straight down:

    chat_completions()            the route
      schema.read_body()          parses and checks the body
      model.sessions.begin()      puts the conversation so far before it, if it names a session (sessions.py)
      chat_format.prompt()        renders the messages to token ids (nanochat/conversation.py)
      answer.submit()             takes the answer from the response cache, or else (answers.py)
        model.submit()            hands the requests to an engine's thread (loop.py)
          engine.step()           samples a token of each request, again and again (nanochat/engine.py)
      answer.respond()            makes OpenAI's objects of what comes back, whole or as a stream (answers.py)

The routes about the server itself are in information.py.
"""

import contextlib
import hmac
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flask
from werkzeug.exceptions import HTTPException

from nanochat.conversation import ChatFormat, Message, text_prompt
from nanochat.detokenizer import AnswerDecoder
from nanochat.engine import Engine, Request
from nanochat.serve.answers import ChatAnswer, TextAnswer
from nanochat.serve.hosts import Hosts
from nanochat.serve.information import information
from nanochat.serve.loop import Model, Models, ServerConfig
from nanochat.serve.messages import mend
from nanochat.serve.schema import ApiError, ChatRequest, CompletionRequest, Parameters, read_body

access_log = logging.getLogger("nanochat.access")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

api = flask.Blueprint("api", __name__)


def create_app(
    engine: Engine,
    model_name: str = "nanochat",
    config: ServerConfig | None = None,
    chat_format: ChatFormat | None = None,
) -> flask.Flask:
    """Return the application over one engine; `make_server` serves it, any WSGI server can.

    chat_format: None means the project's own. `app.extensions["models"].close()` ends the engine's thread.
    """
    models = Models(config or ServerConfig(), [model_name])
    models.add(model_name, [engine], chat_format or ChatFormat(engine.tokenizer))
    return create_app_for(models)


def create_app_for(models: Models) -> flask.Flask:
    """Return the application over several models, which may still be loading.

    Raises ValueError for bad API keys or host names.
    """
    origins = (models.config.cors_origin or "").split(",")
    app = flask.Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = models.config.max_body
    app.config["API_KEYS"] = read_api_keys(models.config.api_keys)
    app.config["HOSTS"] = Hosts(models.config.host, models.config.allowed_host or ())
    app.config["ORIGINS"] = {origin.strip().rstrip("/") for origin in origins} - {""}
    app.extensions["models"] = models
    app.register_blueprint(api)
    app.register_blueprint(information)
    return app


def make_server(app: flask.Flask, host: str, port: int) -> Any:
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


# ---- Around every route: request ids, API keys, other origins, refusals, the access log


def read_api_keys(path: str | None) -> list[str]:
    """Return the keys of a file (one a line, # for comments) and of $NANOCHAT_API_KEYS.

    Raises ValueError for a file without any key, and for a key so short that it could be guessed.
    """
    keys = os.environ.get("NANOCHAT_API_KEYS", "").split(",")
    if path is not None:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        listed = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not listed:
            raise ValueError(f"--api-keys {path}: there is no key in it; leave the flag out to serve without keys")
        keys += listed
    keys = [key.strip() for key in keys if key.strip()]
    if any(len(key) < 8 for key in keys):
        raise ValueError("an API key has less than 8 characters: make longer ones")
    return keys


@api.before_app_request
def begin_request() -> tuple[str, int] | None:
    """Note what the route and the access log need, and check who asks.

    Raises ApiError 401 without a valid key; without keys, 403 if the server is asked for by a name that is not its own.
    """
    request = flask.request
    # A proxy's id is taken over, so that its log and ours can be joined; only safe characters get into a log line.
    given = request.headers.get("X-Request-Id", "")
    flask.g.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    flask.g.started = time.monotonic()
    flask.g.models = flask.current_app.extensions["models"]
    flask.g.owner = 0  # the number of the API key; sessions belong to it
    flask.g.facts = {}  # what an answer adds to the access log
    keys = flask.current_app.config["API_KEYS"]
    hosts = flask.current_app.config["HOSTS"]
    # Load balancers ask for /health: by any name, and without a key.
    if not keys and request.path != "/health" and not hosts.serve(request.headers.get("Host")):
        raise ApiError(
            403, "this server does not go by that name: start it with --allowed-host NAME, or with --api-keys"
        )
    is_preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
    # A browser sends the preflight of a cross-origin request without its key, so it is answered before keys count.
    if is_preflight and allowed_origin():
        return "", 204
    if keys and request.path != "/health":
        flask.g.owner = owner_of(request)
    return None


def owner_of(request: flask.Request) -> int:
    """Return the number of the request's API key. Raises ApiError 401 if it has no valid one."""
    given = ""
    if request.authorization:
        given = request.authorization.token or request.authorization.password or ""
    # In constant time, and without stopping at the first match: the duration tells a guesser nothing.
    keys = flask.current_app.config["API_KEYS"]
    matches = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
    if not any(matches):
        # Asked with Basic, a browser shows its own dialog: any name, the key as password. So the page works, too.
        ask = {"WWW-Authenticate": 'Basic realm="nanochat: the password is an API key"'}
        message = "no valid API key: send 'Authorization: Bearer KEY'"
        raise ApiError(401, message, code="invalid_api_key", headers=ask)
    return matches.index(True)


def allowed_origin() -> str | None:
    """Return the origin of the web page that asks, if it may use the API."""
    origin = flask.request.headers.get("Origin")
    allowed = flask.current_app.config["ORIGINS"]
    return origin if origin and (origin in allowed or "*" in allowed) else None


@api.app_errorhandler(ApiError)
def refuse(error: ApiError) -> tuple[dict, int, dict]:
    """Answer with a refusal."""
    return error.body, error.status, error.headers


@api.app_errorhandler(HTTPException)
def refuse_as_http(error: HTTPException) -> tuple[dict, int, dict]:
    """Give what Flask and werkzeug refuse (404, 405, 413 ...) the same shape."""
    headers = {name: value for name, value in error.get_response().headers.items() if name == "Allow"}
    message = error.description or error.name
    if error.code == 404:
        there = "/v1/chat/completions, /v1/completions and /v1/models; /openapi.json lists all"
        message = f"there is no {flask.request.path} here, but {there}"
    return refuse(ApiError(error.code or 500, message, headers=headers))


@api.after_app_request
def end_request(response: flask.Response) -> flask.Response:
    """Add the headers that every answer has, and see to its line in the access log."""
    response.headers["X-Request-Id"] = flask.g.request_id
    # A browser takes the declared type, and does not guess that an answer's text might be a page.
    response.headers["X-Content-Type-Options"] = "nosniff"
    if flask.current_app.config["ORIGINS"]:
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
        flask.g.models.metrics.refused.labels(response.status_code).inc()
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

    def log() -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        seconds = round(time.monotonic() - started, 4)
        access_log.info(json.dumps({"time": now, **line, "seconds": seconds, **facts}))

    # When the body has been sent, because the facts of a stream are known only then.
    response.call_on_close(log)
    return response


# ---- The two routes that make answers


@api.post("/v1/chat/completions")
def chat_completions() -> flask.Response:
    """Answer the last message of a chat."""
    body = read_body(json_body(), ChatRequest)
    model = flask.g.models.get_for_answer(body.model or None)
    messages = [message.as_turn() for message in body.messages]
    chat_format = model.chat_format
    # One after the other, so that a refusal names the right one.
    if body.chat_template_kwargs:
        with refuse_mistakes("chat_template_kwargs"):
            chat_format = chat_format.with_arguments(body.chat_template_kwargs)
    if body.reasoning_effort:
        with refuse_mistakes("reasoning_effort"):
            effort = {"reasoning_effort": body.reasoning_effort}
            chat_format = chat_format.with_arguments({**chat_format.arguments, **effort})
    turn = None
    try:
        with refuse_mistakes("messages"):
            if body.session_id is not None:
                # The owner is part of the key: the holder of one API key cannot read on in another's conversation.
                turn = model.sessions.begin((flask.g.owner, body.session_id), messages)
                messages = turn.messages
            else:
                messages = mend(messages)
            requests = chat_requests(model, body, messages, chat_format)
        answer = ChatAnswer(model, requests, cache_key(model, body, requests), turn)
        answer.submit()
    except BaseException:
        # A session answers one turn at a time: left open, it would refuse all further ones with 409.
        if turn is not None:
            model.sessions.end(turn)
        raise
    return answer.respond(body)


@api.post("/v1/completions")
def text_completions() -> flask.Response:
    """Continue a text, or several."""
    body = read_body(json_body(), CompletionRequest)
    model = flask.g.models.get_for_answer(body.model or None)
    with refuse_mistakes("prompt"):
        requests = text_requests(model, body)
    answer = TextAnswer(model, requests, cache_key(model, body, requests), echoes=echoes_of(model, body))
    answer.submit()
    return answer.respond(body)


def echoes_of(model: Model, body: CompletionRequest) -> list[str]:
    """Return the text with which each choice begins: its prompt, if the body asks for `echo`."""
    if not body.echo:
        return []
    texts = []
    for prompt in body.prompts():
        if not isinstance(prompt, str):
            # Token ids are shown as an answer of these tokens would be: without special tokens.
            decoder = AnswerDecoder(model.tokenizer)
            events = []
            for token in prompt:
                events += decoder.feed(token)
            events += decoder.finish()
            prompt = "".join(event for event in events if isinstance(event, str))
        texts += [prompt] * (body.n or 1)
    return texts


@contextlib.contextmanager
def refuse_mistakes(param: str) -> Iterator[None]:
    """Turn a ValueError inside the block into ApiError 400, which names the parameter."""
    try:
        yield
    except ValueError as error:
        raise ApiError(400, f"'{param}': {error}", param) from error


def json_body() -> bytes:
    """Return the body of the request. Raises ApiError 415 if it is not declared to be JSON, or compressed."""
    # A web page of another origin can post text without asking first, but JSON only after a preflight.
    if not flask.request.is_json:
        raise ApiError(415, "send JSON, with 'Content-Type: application/json'")
    encoding = flask.request.headers.get("Content-Encoding") or "identity"
    if encoding.lower() != "identity":
        raise ApiError(415, f"send the body as it is, without 'Content-Encoding: {encoding}'")
    return flask.request.get_data(cache=False)


def chat_requests(model: Model, body: ChatRequest, messages: list[Message], chat_format: ChatFormat) -> list[Request]:
    """Return `n` engine requests for the next answer of a chat. Raises ValueError if it cannot be made."""
    # The oldest turns are dropped where the whole conversation would leave no room for an answer.
    prompt = chat_format.prompt(messages, model.engine.context, longest_answer(model, body))
    logprobs = None
    if body.logprobs:
        logprobs = body.top_logprobs or 0
    requests = make_requests(model, body, [prompt], logprobs)
    for request in requests:
        request.decoder = chat_format.decoder(prompt, request.stop)
    return requests


def text_requests(model: Model, body: CompletionRequest) -> list[Request]:
    """Return `n` engine requests for each prompt of the body. Raises ValueError if one can never run."""
    requests = make_requests(model, body, body.prompts(), body.logprobs, body.scores_prompt)
    for request in requests:
        request.decoder = AnswerDecoder(model.tokenizer, request.stop)  # a continued text has no reasoning
    return requests


def make_requests(
    model: Model,
    body: Parameters,
    prompts: Sequence[str | list[int]],
    logprobs: int | None,
    prompt_logprobs: bool = False,
) -> list[Request]:
    """Return `n` engine requests for each prompt, prompt by prompt.

    Raises ValueError if one can never run, and ApiError 400 for more of them than can ever be open at once.
    """
    n = len(prompts) * (body.n or 1)
    limit = model.replicas[0].limit
    if n > limit:
        raise ApiError(400, f"{n} answers at once: this server makes at most {limit}", "n")
    sampling = body.sampling(model.engine.vocab_size, model.config.temperature)
    requests = []
    for prompt in prompts:
        if isinstance(prompt, str):
            prompt = text_prompt(prompt, model.tokenizer)
        for sample in range(body.n or 1):
            request = Request(
                prompt,
                max_tokens=longest_answer(model, body),
                sample=sample,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                **sampling,
            )
            # Checked here and not on the engine's thread, where an error could only end the engine. `check` reads
            # nothing that changes, so any thread may call it.
            model.engine.check(request)
            requests.append(request)
    return requests


def longest_answer(model: Model, body: Parameters) -> int | None:
    """Return the smaller of the request's and the server's limits; None means to the end of the context."""
    limits = [limit for limit in (body.max_tokens, model.config.max_tokens) if limit is not None]
    return min(limits, default=None)


def cache_key(model: Model, body: Parameters, requests: Sequence[Request]) -> str | None:
    """Return the key in the response cache of an answer that is sure to repeat, else None."""
    # The same request with the same seed gives the same tokens in any company: on CPU to the bit, on a GPU except for
    # rounding. At temperature 0 nothing is drawn, so the seed does not matter.
    repeats = body.seed is not None or requests[0].temperature == 0
    if not repeats or not model.config.cache_mb:
        return None
    # These fields change how an answer is sent, not what it says: a streamed answer may be kept for a whole one.
    # The model is left out because each has a cache of its own.
    not_said = {"stream", "stream_options", "user", "safety_identifier", "prompt_cache_key", "session_id", "model"}
    asked = body.model_dump(exclude=not_said)
    # In a session the prompt has more than the body: what was said before.
    return model.responses.key([asked, flask.g.owner, requests[0].tokens])
