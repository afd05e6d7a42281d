"""`nanochat.models`, as other people's programs use it: the examples of the documents, and what the engine gives."""

import inspect
import re
from pathlib import Path

import pytest
from tiny_chat import ANSWERS, STORY, save_tiny_chat, text_of, tiny_chat

from nanochat import models
from nanochat.conversation import render_for_completion
from nanochat.engine import Engine, Request

README = Path(__file__).resolve().parent.parent / "README.md"
QUESTION = [{"role": "user", "content": "What is 37*48?"}]


@pytest.fixture(scope="module", autouse=True)
def base_dir(tmp_path_factory):
    folder = save_tiny_chat(tmp_path_factory.mktemp("base"), "base", "sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        patch.setenv("NANOCHAT_DTYPE", "float32")
        patch.setenv("HF_HUB_CACHE", str(folder / "none"))
        yield folder


@pytest.fixture(scope="module")
def model():
    return models.load("sft")


def examples():
    """The indented code of the module's description, and the Python blocks of the README."""
    code = re.search(r"\n\n((?:    .*\n|\n)+)", models.__doc__)[1]
    return [inspect.cleandoc(code), *re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)]


@pytest.mark.parametrize("code", examples())
def test_examples(code, capsys):
    exec(code, {})
    assert text_of("What is 37*48?") in capsys.readouterr().out


def test_chat(model):
    for question in ANSWERS:
        assert model.chat(question) == model.chat([{"role": "user", "content": question}]) == text_of(question)
    pieces = list(model.chat("Tell me a story", stream=True))
    assert "".join(pieces) == STORY and len(pieces) > 50
    answered = [*QUESTION, {"role": "assistant", "content": ANSWERS[QUESTION[0]["content"]]}]
    assert model.chat([*answered, {"role": "user", "content": "Hello"}]) == text_of("Hello")
    assert model.chat("Tell me a story", stop=["On day 2"]) == STORY.split("On day 2")[0]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 7}, {"temperature": 2.0, "top_k": 3, "seed": 8}])
def test_tokens_are_the_engines(model, settings):
    network, tokenizer = tiny_chat()
    engine = Engine(network, tokenizer, max_batch=2)
    sampling = {"temperature": 0.0, "max_tokens": 30, **settings}
    for text, continued in [("Once there", model.complete), ("Tell me a story", model.chat)]:
        prompt = tokenizer.encode(text, prepend="<|bos|>")
        if continued == model.chat:
            prompt = render_for_completion({"messages": [{"role": "user", "content": text}]}, tokenizer)
        request = Request(prompt, **sampling)
        engine.run([request])
        assert "".join(continued(text, stream=True, **sampling)) == tokenizer.decode(request.output)


def test_streams_are_read_in_turns_and_left(model):
    left = model.chat("Tell me a story", stream=True)
    next(left)
    del left
    assert not model.engine.busy
    both = zip(model.chat("Tell me a story", stream=True), model.complete("Once there", stream=True), strict=False)
    story, _ = zip(*both, strict=True)
    assert STORY.startswith("".join(story)) and len(story) > 5
    assert not model.engine.busy and model.chat("Hello") == text_of("Hello")


@pytest.mark.parametrize("name", ["sft/", "sft/tiny/"])
def test_a_name_may_end_as_that_of_a_folder(model, name):
    assert models.load(name.replace("tiny", model.name.partition("/")[2])).name == model.name


def test_a_folder_may_be_a_path(tmp_path):
    with pytest.raises(ValueError, match="no model"):
        models.load(tmp_path / "nothing")


def test_mistakes_are_told_at_once(model, base_dir, tmp_path):
    with pytest.raises(ValueError, match="sft/tiny"):
        models.load("nobody/nothing")
    with pytest.raises(ValueError, match="sft/tiny"):
        models.load("sft/other")
    with pytest.raises(ValueError, match="chat_rl"):
        models.load("rl")
    with pytest.raises(ValueError, match="complete"):
        models.load("base").chat("Hello")
    with pytest.raises(ValueError, match="leaves no room"):
        model.complete("Hello " * 900, stream=True)
    with pytest.raises(ValueError, match="temperature"):
        model.chat("Hello", stream=True, temperature=-1)
    with pytest.raises(ValueError, match="content is empty"):
        model.chat("", stream=True)
    with pytest.raises(TypeError, match="temprature"):
        model.chat("Hello", temprature=1)
    assert not model.engine.busy
