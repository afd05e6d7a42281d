"""The server as others see it: the official OpenAI client, and schemathesis, which sends what the description allows
and what it does not."""

import asyncio
import http.client
import json
import re
import subprocess
import sys
import time

import pytest
from tiny_chat import ANSWERS, STORY, running_server, text_of

QUESTION = [{"role": "user", "content": "What is 37*48?"}]
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server():
    with running_server(max_waiting=400) as (engine, port, _):
        yield engine, port


@pytest.fixture
def openai():
    return pytest.importorskip("openai", reason="the official client is not installed: pip install openai")


@pytest.fixture
def client(openai, server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server[1]}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_official_client(client):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    reply = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0, max_completion_tokens=50)
    message = reply.choices[0].message
    assert (message.role, message.content, reply.choices[0].finish_reason) == ("assistant", "37*48 is 1776.", "stop")
    assert message.tool_trace == [{"expression": "37*48", "result": "1776"}]
    echoed = message.model_dump()  # with its empty fields, as programs send it back
    reply = client.chat.completions.create(
        model="tiny",
        messages=[*QUESTION, echoed, *HELLO],
        logprobs=True,
        top_logprobs=2,
        stop=["tiny"],
        n=2,
        user="ada",
        response_format={"type": "text"},
        extra_body={"top_k": 5, "min_p": 0.0, "repetition_penalty": 1.0},
    )
    assert [choice.message.content for choice in reply.choices] == [text_of("Hello").split("tiny")[0]] * 2
    assert len(reply.choices[0].logprobs.content[0].top_logprobs) == 2
    text = client.completions.create(model="tiny", prompt="Hello", max_tokens=3, logprobs=1)
    assert text.object == "text_completion" and len(text.choices[0].logprobs.tokens) == text.usage.completion_tokens


def test_official_client_streams(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="tiny", messages=QUESTION, **options))
    said = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.delta.content or "" for choice in said) == "37*48 is 1776."
    assert chunks[-1].usage.completion_tokens == 17 and said[-1].finish_reason == "stop"
    pieces = client.completions.create(model="tiny", prompt="Hello", max_tokens=6, **options)
    whole = client.completions.create(model="tiny", prompt="Hello", max_tokens=6).choices[0].text
    assert "".join(chunk.choices[0].text for chunk in pieces if chunk.choices) == whole
    with client.chat.completions.stream(model="tiny", messages=HELLO) as stream:
        assert stream.get_final_completion().choices[0].message.content == text_of("Hello")


def test_official_client_hears_of_errors(openai, client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, tools=[{"type": "function"}])
    assert caught.value.param == "tools" and "'tools' is not supported" in str(caught.value)
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with (
        running_server() as (engine, port, _),
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x") as own,
    ):
        chunks = own.chat.completions.create(model="tiny", messages=HELLO, stream=True, max_tokens=500)
        engine.step = lambda: 1 / 0
        with pytest.raises(openai.APIError, match="engine stopped"):
            list(chunks)


def test_official_client_asynchronously(openai, server):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server[1]}/v1", api_key="none") as client:

            async def ask(question, i):
                options = {"model": "tiny", "messages": [{"role": "user", "content": question}], "seed": i}
                if i % 2:
                    return (await client.chat.completions.create(**options)).choices[0].message.content
                stream = await client.chat.completions.create(**options, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            questions = list(ANSWERS) * 4
            answers = await asyncio.gather(*(ask(question, i) for i, question in enumerate(questions)))
            assert answers == [text_of(question) for question in questions]

    asyncio.run(main())


def test_two_hundred_clients_that_leave(server):
    """Some before, most in the middle of their answers; one that stays is answered in time, and every place is free."""
    engine, port = server
    body = {"messages": [{"role": "user", "content": "Tell me a story"}], "stream": True, "temperature": 0.5}
    connections = []
    for i in range(200):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        data = json.dumps({**body, "seed": i, "stream": i % 4 != 3}).encode()
        connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
        connections.append(connection)
    connections[0].getresponse().read(300)
    for connection in connections:
        connection.close()
    started = time.time()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = json.dumps({"messages": body["messages"]})
    connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
    assert json.loads(connection.getresponse().read())["choices"][0]["message"]["content"] == STORY
    assert time.time() - started < 5
    while engine.busy and time.time() - started < 10:
        time.sleep(0.02)
    assert not engine.busy and engine.stats()["running"] == engine.stats()["waiting"] == 0
    connection.request("GET", "/stats")
    assert json.loads(connection.getresponse().read())["models"]["tiny"]["open_requests"] == 0


def test_schemathesis(tmp_path):
    """No answer of 500 and more, and none that the description does not have, to what fits it and what does not."""
    pytest.importorskip("schemathesis", reason="not installed: pip install schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    checks += ",response_headers_conformance,negative_data_rejection,unsupported_method"
    with running_server(max_tokens=4) as (_, port, _):
        url = f"http://127.0.0.1:{port}/openapi.json"
        options = ["--checks", checks, "--max-examples", "25", "--seed", "1", "--phases", "examples,coverage,fuzzing"]
        run = [sys.executable, "-m", "schemathesis.cli", "run", url, *options, "--mode", "all", "--no-color"]
        result = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) generated, \1 passed", result.stdout)
    assert passed and int(passed[1]) > 100 and "Tested: 11" in result.stdout, result.stdout  # all but /openapi.json
