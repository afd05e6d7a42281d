"""The streaming detokenizer against Python's own UTF-8, and stop texts against a search of the whole text."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.detokenizer import AnswerDecoder, StopFilter, ToolCall
from nanochat.tokenizer import Tokenizer

TEXTS = ["What is 12*12? The result is 144. How many r are in strawberry? Three of them, say it: 3. 🎉🦄é\n"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(TEXTS, 320)


@pytest.fixture(scope="module")
def small():
    """Bytes and little else: its tokens split every emoji."""
    return Tokenizer.train_from_iterator(["abcdefgh " * 50], 266)


def show(tokenizer, ids, stop=()):
    decoder = AnswerDecoder(tokenizer, stop)
    return [event for token in ids for event in decoder.feed(token)] + decoder.finish()


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab é🎉🦄👨‍👩‍👧漢\u0301\n"), max_size=20))
def test_streamed_text_is_whole_characters(small, text):
    """Byte tokens split every emoji; the pieces shown must join to the text and never hold a broken character."""
    ids = [small.encode_bytes(bytes([byte]))[0] for byte in text.encode()]
    pieces = show(small, ids)
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert "".join(show(small, small.encode(text))) == text


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=30))
def test_any_bytes_decode_as_python_does(small, data):
    ids = [small.encode_bytes(bytes([byte]))[0] for byte in data]
    assert "".join(show(small, ids)) == data.decode("utf-8", errors="replace")


def test_tool_calls_are_told_from_text(tokenizer):
    def ids(text):
        for i, piece in enumerate(text.split("|")):
            yield from tokenizer.encode(piece) if i % 2 == 0 else [tokenizer.encode_special(f"<|{piece}|>")]

    whole = "It is |python_start|12*12|python_end||output_start|144|output_end|144."
    broken = "A|python_start|1+|python_end|B|user_start|C|output_start|7|output_end|"
    for text, expected in [
        (whole, ["It is ", ToolCall("12*12", "144"), "144."]),
        (broken, ["A", ToolCall("1+", None), "BC"]),
        ("A|python_start|2", ["A", ToolCall("2", None)]),
        ("A|python_start|2|python_end|", ["A", ToolCall("2", None)]),
    ]:
        merged = []
        for event in show(tokenizer, ids(text)):
            if isinstance(event, str) and merged and isinstance(merged[-1], str):
                merged[-1] += event
            else:
                merged.append(event)
        assert merged == expected


def first_end(text, stops):
    """What stands before the first stop that is complete, reading letter by letter; None when there is none."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


letters = st.text(alphabet="ab🎉\n", max_size=25)


@settings(max_examples=300, deadline=None)
@given(letters, st.lists(st.text(alphabet="ab🎉\n", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 25)))
def test_stop_texts_never_leak(text, stops, cuts):
    """In any pieces: what is shown so far never needs to be taken back, and in the end is what precedes the stop."""
    expected = first_end(text, stops)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    filter, shown = StopFilter(stops), ""
    for a, b in itertools.pairwise(edges):
        shown += filter.feed(text[a:b])
        assert (text if expected is None else expected).startswith(shown)
        longest_held = max((len(stop) for stop in stops), default=1) - 1
        assert filter.stopped or len(shown) >= b - longest_held  # and no more is held back than has to be
    shown += filter.flush()
    assert filter.stopped == (expected is not None)
    assert shown == (text if expected is None else expected)


@settings(max_examples=100, deadline=None)
@given(letters, st.lists(st.text(alphabet="ab🎉\n", min_size=1, max_size=4), max_size=3), st.randoms())
def test_stop_texts_across_tokens_and_bytes(small, text, stops, random):
    """Tokens that cut stops and characters anywhere: token by token or byte by byte, the same text is shown."""
    ids = []
    for letter in text:
        ids += (
            small.encode(letter)
            if random.random() < 0.5
            else [small.encode_bytes(bytes([b]))[0] for b in letter.encode()]
        )
    expected = first_end(text, stops)
    assert "".join(show(small, ids, stops)) == (text if expected is None else expected)
    assert "".join(show(small, small.encode(text), stops)) == (text if expected is None else expected)


def test_after_a_stop_text_nothing_follows(tokenizer):
    decoder = AnswerDecoder(tokenizer, ["result"])
    ids = [*tokenizer.encode("The result is 144"), tokenizer.encode_special("<|python_start|>"), 65]
    assert "".join(event for token in ids for event in decoder.feed(token)) == "The "
    assert decoder.stopped and decoder.finish() == []
    held = AnswerDecoder(tokenizer, ["12*13"])
    shown = [event for token in tokenizer.encode("12*1") for event in held.feed(token)]
    assert "".join(shown) == "" and held.finish() == ["12*1"] and not held.stopped


def test_what_is_held_back_comes_before_a_tool_call(tokenizer):
    marks = [tokenizer.encode_special(f"<|{name}|>") for name in ("python_start", "python_end")]
    ids = [*tokenizer.encode("ab"), marks[0], *tokenizer.encode("1+"), marks[1], *tokenizer.encode("c")]
    assert show(tokenizer, ids, ["abc"]) == ["ab", ToolCall("1+", None), "c"]
