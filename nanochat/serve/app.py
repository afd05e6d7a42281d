"""The HTTP server: the chat page and the OpenAI API, as a Flask application under waitress.

This file follows a request. A chat goes straight down from here:

    chat_completions()            the route
      schema.read_body()          parses and checks the body
      model.sessions.begin()      puts the conversation so far before it, if it names a session (sessions.py)
      chat_format.prompt()        renders the messages to token ids (conversation.py)
      model.submit()              hands them to an engine's thread (loop.py)
        engine.step()             samples a token of each request (nanochat/engine.py)
      Answer                      makes OpenAI's objects of what comes back (answers.py)
      send()                      sends them, whole or as a stream

What holds for all routes (keys, origins, the access log) and the server around them are in server.py; the routes that
tell of the server are in information.py.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nanochat.conversation import ChatFormat, Message
from nanochat.detokenizer import AnswerDecoder
from nanochat.engine import Engine, Request
from nanochat.serve.answers import Answer, ChatForm, TextForm
from nanochat.serve.information import add_information
from nanochat.serve.loop import Model
from nanochat.serve.models import Models, ServerConfig
from nanochat.serve.schema import ApiError, ChatRequest, CompletionRequest, Parameters, read_body
from nanochat.serve.server import add_policy
from nanochat.serve.sessions import SessionTurn

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
    _add_completions(app, models)
    add_information(app, models)
    return app


def _add_completions(app: "flask.Flask", models: Models) -> None:
    """Add the two routes that make answers."""
    import flask

    @app.post("/v1/chat/completions")
    def chat_completions() -> flask.Response:
        body = read_body(json_body(), ChatRequest)
        model = models.get_for_answer(body.model)
        messages = [message.as_turn() for message in body.messages]
        session = None
        if body.session_id is not None:
            # The owner is part of the key: the holder of one API key cannot read on in another's conversation.
            session = model.sessions.begin((flask.g.owner, body.session_id), messages)
            messages = session.messages
        try:
            requests = chat_requests(model, body, messages, models.config)
            # What the session holds is asked for, too, so the messages are part of the key and not the body's alone.
            key = cache_key(model, body, requests, [ChatForm.id_prefix, flask.g.owner, messages])
            answer = begin(ChatForm(), model, body, requests, key, session)
        except BaseException:
            # A session answers one turn at a time: left open, it would refuse all further ones with 409.
            if session is not None:
                session.end()
            raise
        return send(answer, body)

    @app.post("/v1/completions")
    def text_completions() -> flask.Response:
        body = read_body(json_body(), CompletionRequest)
        model = models.get_for_answer(body.model)
        requests = text_requests(model, body, models.config)
        key = cache_key(model, body, requests, [TextForm.id_prefix, flask.g.owner])
        return send(begin(TextForm(), model, body, requests, key), body)

    def json_body() -> bytes:
        # A web page of another origin can post text without asking first, but JSON only after a preflight.
        if not flask.request.is_json:
            raise ApiError(415, "send JSON, with 'Content-Type: application/json'")
        return flask.request.get_data(cache=False)

    def cache_key(model: Model, body: Parameters, requests: Sequence[Request], context: list[Any]) -> str | None:
        """Return the key of an answer that is sure to repeat, else None. context: what decides it besides the body."""
        # Engines repeat themselves to the bit: at temperature 0 always, otherwise when the client names the seed.
        repeats = body.seed is not None or requests[0].temperature == 0
        if not repeats or not models.config.cache_mb:
            return None
        # These fields change how an answer is sent, not what it says: a streamed answer may be kept for a whole one.
        # The model is left out because each has a cache of its own.
        asked = body.model_dump(exclude={"stream", "stream_options", "user", "session_id", "model"})
        return model.responses.key([asked, *context])

    def begin(
        form: ChatForm | TextForm,
        model: Model,
        body: Parameters,
        requests: Sequence[Request],
        key: str | None,
        session: SessionTurn | None = None,
    ) -> Answer:
        """Take the answer from the response cache, or submit its requests. Raises ApiError as Model.submit does."""
        kept = model.responses.get(key) if key is not None else None
        ticket = model.submit(requests) if kept is None else None
        with_logprobs = body.top_logprobs_wanted() is not None
        return Answer(form, model, requests, with_logprobs, cache_key=key, kept=kept, ticket=ticket, session=session)

    def send(answer: Answer, body: Parameters) -> flask.Response:
        """Send an answer, whole or streamed; whatever becomes of it, it is closed."""
        answer.facts["stream"] = bool(body.stream)
        if body.user:
            answer.facts["user"] = body.user
        flask.g.facts = answer.facts
        # waitress alone tells when the client has hung up; under another WSGI server answers are made to their end.
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
        # A stream is read after this function has returned. Flask calls `close` when it has been sent, or cut off.
        response.call_on_close(answer.close)
        return response


def chat_requests(model: Model, body: ChatRequest, messages: list[Message], config: ServerConfig) -> list[Request]:
    """Return `n` engine requests for the next answer of a chat. Raises ApiError 400 if it cannot be made."""
    limit = longest_answer(body, config)
    sampling = body.sampling(model.engine.vocab_size, config.temperature)
    check_number(model, body.n or 1)
    try:
        # The oldest turns are dropped where the whole conversation would leave no room for an answer.
        prompt = model.chat_format.prompt(messages, model.engine.context, limit)
        requests = [Request(prompt, limit, sample=i, **sampling) for i in range(body.n or 1)]
        for request in requests:
            # Checked here and not on the engine's thread, where an error could only end the engine. `check` reads
            # nothing that changes, so any thread may call it.
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
                # Models are trained on documents that begin with <|bos|>; some tokenizers of others have no such token.
                prompt_ids = [] if bos is None else [bos]
                prompt_ids += model.tokenizer.encode(prompt)
            else:
                prompt_ids = prompt
            for i in range(body.n or 1):
                request = Request(prompt_ids, limit, sample=i, **sampling)
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
