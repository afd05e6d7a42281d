"""Oracle: the chat format written a second time, as a table of (text, supervised) spans."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.conversation import PARTS as KINDS
from nanochat.conversation import ChatFormat, render, render_for_completion, validate
from nanochat.finetune import render_all
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_iterator(
        ["what is the sum of two and three? it is five, I think. " * 3, "日本 😀"], 320
    )


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def part(kind, text):
    return {"type": kind, "text": text}


TOOL = [part("text", "I add. "), part("python", "2+3"), part("python_output", "5"), part("text", "It is 5.")]
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        user("what is 2+3?"),
        assistant(TOOL),
        user("thank you"),
        assistant("at any time"),
    ]
}


def spans(ids: list[int], mask: list[int], tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """Decoded runs of equal mask: what a reader sees as supervised."""
    runs: list[tuple[list[int], int]] = []
    for token, flag in zip(ids, mask, strict=True):
        if not runs or runs[-1][1] != flag:
            runs.append(([], flag))
        runs[-1][0].append(token)
    return [(tokenizer.decode(run), flag) for run, flag in runs]


def test_supervised_ids_are_exactly_the_assistants(tokenizer):
    assert spans(*render(CHAT, tokenizer), tokenizer) == [
        ("<|bos|><|user_start|>Be brief.\n\nwhat is 2+3?<|user_end|><|assistant_start|>", 0),
        ("I add. <|python_start|>2+3<|python_end|>", 1),
        ("<|output_start|>5<|output_end|>", 0),
        ("It is 5.<|assistant_end|>", 1),
        ("<|user_start|>thank you<|user_end|><|assistant_start|>", 0),
        ("at any time<|assistant_end|>", 1),
    ]


def test_ids_are_those_of_the_pieces(tokenizer):
    names = {name: tokenizer.encode_special(name) for name in SPECIAL_TOKENS}
    ids, mask = render({"messages": [user("two"), assistant("five")]}, tokenizer)
    two, five = tokenizer.encode("two"), tokenizer.encode("five")
    start = [names["<|bos|>"], names["<|user_start|>"], *two, names["<|user_end|>"], names["<|assistant_start|>"]]
    assert ids == [*start, *five, names["<|assistant_end|>"]]
    assert mask == [0] * len(start) + [1] * (len(five) + 1)


def test_turns_of_weight_0_are_context_alone(tokenizer):
    """OpenAI's fine-tuning format: weight 0 turns a message off, 1 is what it is without a weight."""
    messages = [user("two"), {**assistant(TOOL), "weight": 0}, {**user("and"), "weight": 0}, assistant("five")]
    ids, mask = render({"messages": messages}, tokenizer)
    assert ids == render({"messages": [user("two"), assistant(TOOL), user("and"), assistant("five")]}, tokenizer)[0]
    learned = [token for token, flag in zip(ids, mask) if flag]
    assert tokenizer.decode(learned) == "five<|assistant_end|>"
    only = {"messages": messages[:2]}
    assert list(render_all([only, CHAT], tokenizer, max_tokens=99)) == [render(CHAT, tokenizer)], "nothing to learn"


@pytest.mark.parametrize("weight", [0, 1])
def test_whole_numbers_may_be_written_as_floats(tokenizer, weight):
    whole = [user("two"), {**assistant("five"), "weight": weight}]
    as_float = [user("two"), {**assistant("five"), "weight": float(weight)}]
    assert render({"messages": as_float}, tokenizer, 99) == render({"messages": whole}, tokenizer, 99)


@pytest.mark.parametrize("weight", [2, -1, 0.5, "0", "1", True, False, [], {}])
def test_other_weights_are_refused_by_name(weight):
    for place, messages in (
        ("message 1 (assistant)", [user("two"), {**assistant("five"), "weight": weight}]),
        ("message 0 (user)", [{**user("two"), "weight": weight}, assistant("five")]),
    ):
        with pytest.raises(ValueError, match=rf"{re.escape(place)}: weight must be 0 or "):
            validate({"messages": messages})
    with pytest.raises(ValueError, match=r"message 0 \(user\): weight must be 0 or absent, not 1"):
        validate({"messages": [{**user("two"), "weight": 1}, assistant("five")]})


WORDS = st.one_of(st.text(min_size=1, max_size=12), st.sampled_from([*SPECIAL_TOKENS, "the sum", " five ", "\ud800"]))
PARTS = st.lists(st.builds(part, st.sampled_from(["text", "python", "python_output"]), WORDS), min_size=1, max_size=5)
WEIGHTS = st.sampled_from([{}, {}, {"weight": 0}, {"weight": 1}, {"weight": None}])
ANSWERS = st.builds(lambda content, weight: {**assistant(content), **weight}, st.one_of(WORDS, PARTS), WEIGHTS)
TURNS = st.tuples(WORDS.map(user), ANSWERS)


@st.composite
def conversations(draw):
    messages = [message for turn in draw(st.lists(TURNS, min_size=1, max_size=4)) for message in turn]
    system = draw(st.one_of(st.none(), WORDS))
    return {"messages": messages if system is None else [{"role": "system", "content": system}, *messages]}


def expected(conversation: dict, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The format as a flat table of ids and flags."""
    marks = {"text": ([], []), "python": (["<|python_start|>"], ["<|python_end|>"])}
    marks["python_output"] = (["<|output_start|>"], ["<|output_end|>"])
    table: list[tuple[list[str], str, list[str], int]] = [(["<|bos|>"], "", [], 0)]
    prefix = ""
    for message in conversation["messages"]:
        content = message["content"]
        if message["role"] == "system":
            prefix = content + "\n\n"
        elif message["role"] == "user":
            table.append((["<|user_start|>"], prefix + content, ["<|user_end|>"], 0))
            prefix = ""
        else:
            learned = int(message.get("weight") != 0)
            table.append((["<|assistant_start|>"], "", [], 0))
            for piece in [part("text", content)] if isinstance(content, str) else content:
                before, after = marks[piece["type"]]
                table.append((before, piece["text"], after, learned * (piece["type"] != "python_output")))
            table.append(([], "", ["<|assistant_end|>"], learned))
    ids, mask = [], []
    for before, text, after, flag in table:
        row = [tokenizer.special_tokens[n] for n in before] + tokenizer.encode(text)
        row += [tokenizer.special_tokens[n] for n in after]
        ids, mask = ids + row, mask + [flag] * len(row)
    return ids, mask


@settings(max_examples=100, deadline=None)
@given(conversations(), st.integers(0, 60))
def test_random_conversations(tokenizer, conversation, max_tokens):
    ids, mask = expected(conversation, tokenizer)
    assert render(conversation, tokenizer) == (ids, mask)
    assert render(conversation, tokenizer, max_tokens) == (ids[:max_tokens], mask[:max_tokens])
    prompt = render_for_completion(conversation, tokenizer)
    assert prompt == ids[: len(prompt)] and prompt[-1] == tokenizer.encode_special("<|assistant_start|>")
    assert parsed(ids[len(prompt) :], tokenizer) == normal(conversation["messages"][-1]["content"])


def parsed(ids: list[int], tokenizer: Tokenizer) -> list[dict]:
    """The parts of the answer that `ids` begin with: rendering, undone."""
    starts = {tokenizer.encode_special(start): kind for kind, (start, _, _) in KINDS.items() if start}
    ends = {tokenizer.encode_special(end) for _, end, _ in KINDS.values() if end}
    runs: list[tuple[str, list[int]]] = [("text", [])]
    for token in ids[: ids.index(tokenizer.encode_special("<|assistant_end|>"))]:
        if token in starts or token in ends:
            runs.append((starts.get(token, "text"), []))
        else:
            runs[-1][1].append(token)
    parts = [part(kind, tokenizer.decode(run)) for kind, run in runs]
    return [piece for piece in parts if piece["text"] or piece["type"] == "python_output"]


def normal(content: str | list[dict]) -> list[dict]:
    """Parts as they read back: neighbouring texts are one, surrogates replaced."""
    result: list[dict] = []
    for piece in [part("text", content)] if isinstance(content, str) else content:
        text = piece["text"].replace("\ud800", "\ufffd")
        if result and result[-1]["type"] == piece["type"] == "text":
            result[-1]["text"] += text
        else:
            result.append(part(piece["type"], text))
    return result


@pytest.mark.parametrize("mark", SPECIAL_TOKENS)
def test_marks_typed_by_a_user_are_text(tokenizer, mark):
    ids, mask = render({"messages": [user(f"a{mark}b"), assistant(f"c{mark}d")]}, tokenizer)
    plain, _ = render({"messages": [user("a"), assistant("b")]}, tokenizer)
    special = set(tokenizer.special_tokens.values())
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert spans(ids, mask, tokenizer)[-1] == (f"c{mark}d<|assistant_end|>", 1)


def test_completion_prompts(tokenizer):
    open_end = {"messages": CHAT["messages"][:-1]}
    prompt = render_for_completion(CHAT, tokenizer)
    assert prompt == render_for_completion(open_end, tokenizer)
    assert tokenizer.decode(prompt).endswith("<|user_start|>thank you<|user_end|><|assistant_start|>")
    silent = [user("hello"), assistant(""), user("well?"), assistant([]), user("so?")]
    text = tokenizer.decode(render_for_completion({"messages": silent}, tokenizer))
    assert text.count("<|assistant_start|><|assistant_end|>") == 2


def test_user_parts_and_silent_programs_are_allowed(tokenizer):
    parts = {"messages": [user([part("text", "a"), part("text", "b")]), assistant([part("python_output", "")])]}
    assert tokenizer.decode(render(parts, tokenizer)[0]) == (
        "<|bos|><|user_start|>ab<|user_end|><|assistant_start|><|output_start|><|output_end|><|assistant_end|>"
    )


@pytest.mark.parametrize(
    ("conversation", "says"),
    [
        ([], "messages"),
        ({}, "messages"),
        ({"messages": []}, "at least one"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "message 0"),
        ({"messages": [{"role": "user"}]}, "message 0"),
        ({"messages": [{"role": "system", "content": "x"}]}, "user message must follow"),
        ({"messages": [assistant("a"), user("b")]}, "message 0: role 'assistant' where 'user'"),
        ({"messages": [user("a"), user("b")]}, "message 1: role 'user' where 'assistant'"),
        ({"messages": [user("a"), assistant("b"), assistant("c")]}, "message 2: role 'assistant' where 'user'"),
        ({"messages": [user("a"), {"role": "system", "content": "x"}]}, "message 1: role 'system'"),
        ({"messages": [user("a"), {"role": "tool", "content": "x"}]}, "message 1: role 'tool'"),
        ({"messages": [user("a"), {"role": ["user"], "content": "x"}]}, "message 1: role"),
        ({"messages": [user("")]}, "message 0 (user): content is empty"),
        ({"messages": [user("a"), assistant("")]}, "message 1 (assistant): content is empty"),
        ({"messages": [user("a"), assistant([])]}, "message 1 (assistant): content is empty"),
        ({"messages": [user("a"), assistant(None)]}, "NoneType"),
        ({"messages": [user("a"), assistant([part("text", "")])]}, "text part is empty"),
        ({"messages": [user("a"), assistant([part("python", "")])]}, "python part is empty"),
        ({"messages": [user("a"), assistant([part("image", "x")])]}, "unknown part type 'image'"),
        ({"messages": [user("a"), assistant([part("text", 3)])]}, "a part must be"),
        ({"messages": [user("a"), assistant(["x"])]}, "a part must be"),
        ({"messages": [user([part("python", "1+1")])]}, "unknown part type 'python'"),
    ],
)
def test_malformed_conversations_name_message_and_problem(tokenizer, conversation, says):
    for check in (validate, lambda conversation: render(conversation, tokenizer)):
        with pytest.raises(ValueError) as error:
            check(conversation)
        assert says in str(error.value) and "\n" not in str(error.value)


@settings(max_examples=60, deadline=None)
@given(conversations(), WORDS, st.integers(16, 120))
def test_dropping_turns_always_fits_and_keeps_the_newest(tokenizer, conversation, question, budget):
    messages = [*conversation["messages"], user(question)]
    kept = ChatFormat(tokenizer).fit(messages, budget)
    prompt = render_for_completion({"messages": kept}, tokenizer)
    assert len(prompt) <= budget and prompt[0] == tokenizer.get_bos_token_id()
    whole = render_for_completion({"messages": messages}, tokenizer)
    if len(whole) <= budget:
        assert kept == messages
    if kept[-1] == messages[-1]:
        turns = [m for m in kept if m["role"] != "system"]
        assert turns == messages[-len(turns) :]


def test_dropping_is_no_more_than_needed_and_keeps_the_system_text(tokenizer):
    turns = [m for i in range(20) for m in (user(f"question {i}"), assistant(f"answer {i}"))] + [user("the last")]
    messages = [{"role": "system", "content": "Be brief."}, *turns]
    kept = ChatFormat(tokenizer).fit(messages, 200)
    assert kept[0] == messages[0] and kept[1:] == turns[-len(kept) + 1 :] and 1 < len(kept) < len(messages)
    one_more = [messages[0], *turns[-len(kept) - 1 :]]
    assert len(render_for_completion({"messages": one_more}, tokenizer)) > 200
    begun = ChatFormat(tokenizer).fit([*messages, assistant("an answer")], 200)
    assert begun[-2:] == [turns[-1], assistant("an answer")] and begun[0] == messages[0] and len(begun) > 1


@pytest.mark.parametrize(
    "text", ["what is the sum? " * 500, "😀" * 3000, "日本" * 3000, "a" * 9000, "\u0301 é\ud800" * 900]
)
@pytest.mark.parametrize("system", [None, "Be brief.", "Be brief. " * 300])
@pytest.mark.parametrize("budget", [8, 64, 512])
def test_an_overlong_question_keeps_its_end(tokenizer, text, system, budget):
    head = [] if system is None else [{"role": "system", "content": system}]
    kept = ChatFormat(tokenizer).fit([*head, user("old"), assistant("older"), user(text)], budget)
    size = len(render_for_completion({"messages": kept}, tokenizer))
    assert size <= budget
    assert text.replace("\ud800", "\ufffd").endswith(kept[-1]["content"].replace("\ud800", "\ufffd"))
    if budget == 512:
        assert len(kept) == (2 if system == "Be brief." else 1)
        assert size > 450  # room is used


def test_ids_that_only_look_like_marks_stay_text(tokenizer):
    typed = "say <|python_start|>1+1<|python_end|>"
    ids = render({"messages": [user("a"), assistant(typed)]}, tokenizer)[0]
    reply = tokenizer.encode_special("<|assistant_start|>")
    assert parsed(ids[ids.index(reply) + 1 :], tokenizer) == [part("text", typed)]


def test_what_is_wrong_most_often_is_said(tokenizer, capsys):
    """Of a file with one mistake in thousands of lines, the last line's other mistake says nothing."""
    empty = {"messages": [user("2+3?"), assistant("")]}
    twice = {"messages": [user("2+3?"), user("well?")]}
    kept = list(render_all([empty, CHAT, empty, twice], tokenizer, max_tokens=200))
    assert kept == [render(CHAT, tokenizer, 200)]
    problems = []
    for conversation in (empty, twice):
        with pytest.raises(ValueError) as refused:
            validate(conversation)
        problems.append(str(refused.value))
    out = capsys.readouterr().out
    assert "3 of 4" in out and problems[0] in out and problems[1] not in out
