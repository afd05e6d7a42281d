"""The server as programs of others see it: one contract, held by several real clients, each used as its users do.

`llm` comes with the test extras. The others are heavy, and skipped where they are missing: `bash dev/clients.sh`
installs them in an environment of their own and runs this file.
"""

import contextlib
import json

import pytest
from tiny_chat import STORY, running_server, text_of, wait_for

MODEL = "sft/tiny"  # names have a slash, as `speedrun.sh` makes them
QUESTION = "What is 37*48?"
LATER = "Tell me a story"


class Llm:
    """The program `llm` and its library: models are listed in a file of the user's."""

    package = "llm"

    def __init__(self, url, key, folder, monkeypatch):
        entries = [{"model_id": MODEL}, {"model_id": "text", "completion": True}, {"model_id": "gpt-9"}]
        for entry in entries:
            name = MODEL if entry["model_id"] == "text" else entry["model_id"]
            entry.update(model_name=name, api_base=url, api_key_name="nanochat", supports_tools=True)
        (folder / "extra-openai-models.yaml").write_text(json.dumps(entries))
        monkeypatch.setenv("LLM_USER_PATH", str(folder))
        self.key = key

    def model(self, name):
        import llm

        model = llm.get_model(name)
        model.key = self.key
        return model

    def say(self, question, model=MODEL, **options):
        return self.model(model).prompt(question, stream=False, **options).text()

    def stream(self, question):
        return iter(self.model(MODEL).prompt(question))

    def talk(self, *questions):
        conversation = self.model(MODEL).conversation()
        return [conversation.prompt(question).text() for question in questions]

    def complete(self, text, **options):
        return self.model("text").prompt(text, stream=False, **options).text()

    def stream_completion(self, text, **options):
        return iter(self.model("text").prompt(text, **options))

    def use_tool(self):
        def seven() -> str:
            return "7"

        return self.model(MODEL).prompt(QUESTION, tools=[seven]).text()


class LangChain:
    """langchain-openai."""

    package = "langchain_openai"

    def __init__(self, url, key, folder, monkeypatch):
        self.server = {"base_url": url, "api_key": key, "max_retries": 0}

    def chat_model(self, model=MODEL, **options):
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(model=model, **self.server, **options)

    def text_model(self, **options):
        from langchain_openai import OpenAI

        return OpenAI(model=MODEL, **self.server, **options)

    def say(self, question, model=MODEL, **options):
        return self.chat_model(model, **options).invoke(question).content

    def stream(self, question):
        return (chunk.content for chunk in self.chat_model().stream(question) if chunk.content)

    def talk(self, *questions):
        messages = []
        for question in questions:
            messages.append(("human", question))
            messages.append(self.chat_model().invoke(messages))
        return [message.content for message in messages[1::2]]

    def complete(self, text, **options):
        return self.text_model(**options).invoke(text)

    def stream_completion(self, text, **options):
        return self.text_model(**options).stream(text)

    def use_tool(self):
        from langchain_core.tools import tool

        @tool
        def seven() -> str:
            """Seven."""
            return "7"

        return self.chat_model().bind_tools([seven]).invoke(QUESTION)


class LiteLlm:
    """litellm, which speaks to any server of OpenAI's protocol as openai/MODEL, and to vLLM as hosted_vllm/MODEL."""

    package = "litellm"

    def __init__(self, url, key, folder, monkeypatch):
        self.server = {"api_base": url, "api_key": key, "num_retries": 0}

    def completion(self, messages, model=MODEL, **options):
        import litellm

        litellm.suppress_debug_info = True
        return litellm.completion(f"hosted_vllm/{model}", messages, **self.server, **options)

    def text_completion(self, text, **options):
        import litellm

        return litellm.text_completion(text, f"text-completion-openai/{MODEL}", **self.server, **options)

    def say(self, question, model=MODEL, **options):
        return self.completion([{"role": "user", "content": question}], model, **options).choices[0].message.content

    def stream(self, question):
        chunks = self.completion([{"role": "user", "content": question}], stream=True)
        return (chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content)

    def talk(self, *questions):
        messages = []
        for question in questions:
            messages.append({"role": "user", "content": question})
            # As programs keep it, with all of its fields, empty and of litellm's own.
            messages.append(self.completion(messages).choices[0].message.model_dump())
        return [message["content"] for message in messages[1::2]]

    def complete(self, text, **options):
        return self.text_completion(text, **options).choices[0].text

    def stream_completion(self, text, **options):
        chunks = self.text_completion(text, stream=True, **options)
        return (chunk.choices[0].text or "" for chunk in chunks)

    def use_tool(self):
        function = {"name": "seven", "parameters": {"type": "object", "properties": {}}}
        return self.completion(
            [{"role": "user", "content": QUESTION}], tools=[{"type": "function", "function": function}]
        )


@pytest.fixture(scope="module", params=[Llm, LangChain, LiteLlm], ids=lambda kind: kind.package)
def kind(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or importing it asks the network for prices
        pytest.importorskip(request.param.package, reason="a client that is not installed: bash dev/clients.sh")
        yield request.param


@pytest.fixture(scope="module")
def server():
    with running_server(model_name=MODEL) as server:
        yield server


@pytest.fixture
def client(kind, server, tmp_path, monkeypatch):
    return kind(f"http://127.0.0.1:{server.port}/v1", "none", tmp_path, monkeypatch)


def test_chat(client, server):
    assert client.say(QUESTION) == text_of(QUESTION)
    options = {"temperature": 0.9, "top_p": 0.9, "seed": 3, "max_tokens": 20, "stop": "tiny"}
    assert client.say(LATER, **options) == server.say(LATER, **options)
    assert client.talk(QUESTION, "Hello", QUESTION) == [text_of(QUESTION), text_of("Hello"), text_of(QUESTION)]


def test_streams(client, server):
    pieces = list(client.stream("Hello"))
    assert "".join(pieces) == text_of("Hello") and len(pieces) > 5
    assert "".join(client.stream_completion("Once there", max_tokens=8)) == client.complete("Once there", max_tokens=8)
    assert STORY.startswith("Once there" + client.complete("Once there", max_tokens=4))


def test_a_stream_that_is_left_frees_its_place(client, server):
    with contextlib.closing(client.stream(LATER)) as pieces:
        next(pieces)
    del pieces
    assert wait_for(lambda: not server.engine.busy, 5)
    assert server.get("/stats")["models"][MODEL]["open_requests"] == 0


def test_what_a_client_shows_of_refusals(client, server, kind, tmp_path, monkeypatch):
    assert client.say("Hello " * 900) == text_of("Hello"), "a chat forgets its beginning"
    with pytest.raises(Exception, match="leaves no room in the context of 768"):
        client.complete("Hello " * 900, max_tokens=8)
    with pytest.raises(Exception, match="there is no model 'gpt-9': this server has sft/tiny"):
        client.say("Hello", model="gpt-9")
    with pytest.raises(Exception, match="'tools' is not supported"):
        client.use_tool()
    (tmp_path / "keys").write_text("a-key-of-mine")
    with running_server(model_name=MODEL, api_keys=str(tmp_path / "keys")) as guarded:
        url = f"http://127.0.0.1:{guarded.port}/v1"
        assert kind(url, "a-key-of-mine", tmp_path, monkeypatch).say("Hello") == text_of("Hello")
        with pytest.raises(Exception, match="no valid API key"):
            kind(url, "another", tmp_path, monkeypatch).say("Hello")


def test_an_engine_that_dies_in_a_stream_is_an_error(kind, tmp_path, monkeypatch):
    with running_server(model_name=MODEL) as dying:
        pieces = kind(f"http://127.0.0.1:{dying.port}/v1", "none", tmp_path, monkeypatch).stream(LATER)
        next(pieces)
        dying.engine.step = lambda: 1 / 0
        with pytest.raises(Exception, match="engine stopped"):
            list(pieces)
