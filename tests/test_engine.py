"""Inference. Oracles: the full forward without a cache, a loop written out, exact probabilities, Python's own UTF-8."""

import collections
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.engine import AnswerDecoder, Engine, Request, ToolCall
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import KVCache
from nanochat.sampling import sample
from nanochat.tokenizer import Tokenizer

TEXTS = ["What is 12*12? The result is 144. How many r are in strawberry? Three of them, say it: 3. 🎉🦄é\n"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(TEXTS, 320)


def make_model(vocab_size=61, seed=0, **changes):
    """A small model, every parameter random: as initialised, layers add nothing and a wrong cache would not show."""
    shape = {"sequence_len": 384, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "window_pattern": "SSSL"}
    model = GPT(GPTConfig(vocab_size=vocab_size, **{**shape, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.25 if parameter.dim() == 2 else 0.7, generator=generator)
    return model.eval()


class ScriptedModel:
    """Obeys the model protocol and says what `script(tokens so far)` returns; it remembers only through the cache."""

    def __init__(self, vocab_size, script, sequence_len=256):
        self.config = types.SimpleNamespace(sequence_len=sequence_len)
        self.device, self.vocab_size, self.script = torch.device("cpu"), vocab_size, script

    def __call__(self, idx_BT, *, cache, positions_BT, last_only):
        content = idx_BT[:, :, None, None].float()
        read_BS, _ = cache.update(0, content, content, positions_BT)
        logits = torch.full((len(idx_BT), 1, self.vocab_size), -1e4)
        for row, positions in enumerate(positions_BT.tolist()):
            history = [int(token) for token in read_BS[row, : positions[-1] + 1].flatten()]
            logits[row, 0, self.script(history)] = 0.0
        return logits


def scripted_engine(tokenizer, answers, max_batch=32, **options):
    """An engine whose model continues prompt p with the ids `answers[p]`."""

    def script(history):
        prompt = next(p for p in answers if tuple(history[: len(p)]) == p)
        return answers[prompt][len(history) - len(prompt)]

    return Engine(ScriptedModel(tokenizer.get_vocab_size(), script, **options), tokenizer, max_batch)


# --- the cache ---


@pytest.mark.parametrize("pattern", ["L", "SL", "SSSL"])
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@torch.inference_mode()
def test_cached_logits_equal_the_full_forward(pattern, n_kv_head):
    """Three rows, read in ragged chunks past the window and the cache's first size, then token by token."""
    model = make_model(window_pattern=pattern, n_kv_head=n_kv_head)
    idx_BT = torch.randint(61, (3, 250), generator=torch.Generator().manual_seed(1))
    expected_BTV = model(idx_BT)
    cache = KVCache(model.device)
    read = [0, 0, 0]
    for chunk in [(150, 7, 40), (1, 60, 33), (0, 90, 80)] + [(1, 1, 1)] * 70:
        width = max(chunk)
        positions = [[at + t if t < n else -1 for t in range(width)] for at, n in zip(read, chunk, strict=True)]
        positions_BT = torch.tensor(positions)
        tokens_BT = idx_BT.gather(1, positions_BT.clamp(min=0))
        read = [at + n for at, n in zip(read, chunk, strict=True)]
        rows = cache.rows(0, 3, max(read))
        logits_BTV = model(tokens_BT, cache=rows, positions_BT=positions_BT)
        rows.advance(tokens_BT, positions_BT)
        for row, n in enumerate(chunk):
            there = expected_BTV[row, read[row] - n : read[row]]
            torch.testing.assert_close(logits_BTV[row, :n], there, atol=1e-4, rtol=1e-4)
    assert expected_BTV.std(dim=-1).min() > 0.1  # the logits say something


def test_growing_keeps_contents():
    cache, seen = KVCache(torch.device("cpu")), {}
    generator = torch.Generator().manual_seed(0)
    for n_rows, length in [(1, 10), (2, 100), (5, 300), (5, 1000)]:
        for row in range(n_rows):
            positions = torch.arange(length)[None]
            new = torch.tensor([p for p in range(length) if (row, p) not in seen])
            content = torch.randn(1, len(new), 2, 3, generator=generator)
            cache.rows(row, row + 1, length).update(0, content, -content, new[None])
            seen.update({(row, int(p)): content[0, i] for i, p in enumerate(new)})
            cache.rows(row, row + 1, length).advance(positions, positions)
    rows = cache.rows(0, 5, 1000)
    keys, values = rows.update(0, torch.zeros(5, 1, 2, 3), torch.zeros(5, 1, 2, 3), torch.full((5, 1), -1))
    for (row, position), content in seen.items():
        assert torch.equal(keys[row, position], content) and torch.equal(values[row, position], -content)
    assert rows.last_token_B.tolist() == [999] * 5


# --- sampling ---


@pytest.mark.parametrize("top_k", [None, 0, 1, 3, 10, 1000])
def test_sampling_follows_the_distribution(top_k):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 3.0, 1.5, float("-inf"), 0.2, 2.5])
    n, temperature = 20_000, 0.7
    uniform = [(i + 0.5) / n for i in range(n)]
    drawn = sample(logits.expand(n, -1), [temperature] * n, [top_k] * n, uniform)
    kept = logits.topk(min(top_k or 10, 10)).indices
    expected = torch.zeros(10)
    expected[kept] = (logits[kept] / temperature).softmax(-1)
    assert (torch.bincount(drawn, minlength=10) / n - expected).abs().max() < 2e-4


def test_rows_are_sampled_by_their_own_settings():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    temperature = [0.0 if i % 3 == 0 else 0.3 * (i % 5 + 1) for i in range(64)]
    top_k = [[None, 0, 1, 2, 7, 49, 50, 99][i % 8] for i in range(64)]
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(1)).tolist()
    together = sample(logits, temperature, top_k, uniform).tolist()
    alone = [sample(logits[i : i + 1], temperature[i : i + 1], top_k[i : i + 1], uniform[i : i + 1]) for i in range(64)]
    assert together == [int(token) for token in alone]
    assert all(together[i] == logits[i].argmax() for i in range(64) if temperature[i] == 0 or top_k[i] == 1)


def test_extreme_draws_stay_within_the_possible_tokens():
    logits = torch.full((4, 1000), float("-inf"))
    logits[:, 17], logits[:, 500] = 0.0, -1.0
    temperature, uniform = [1e-30, 1.0, 2.0, 1e30], [1 - 2**-53, 1 - 2**-53, 0.0, 0.9999999]
    assert sample(logits, temperature, [None, 2, 0, 2000], uniform).tolist() == [17, 500, 17, 500]


# --- generation ---


@torch.inference_mode()
def naive_greedy(model, tokens, n):
    tokens = list(tokens)
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens


def test_greedy_equals_the_plain_loop(tokenizer):
    model = make_model(tokenizer.get_vocab_size())
    engine = Engine(model, tokenizer, max_batch=3)
    prompts = [tokenizer.encode(text, prepend="<|bos|>") for text in ("What", "How many r are in it?", "3", "x" * 90)]
    outputs = engine.complete(prompts, max_tokens=30)
    assert not engine.busy
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = naive_greedy(model, prompt, 30)[len(prompt) :]
        n = len(output)
        assert output == expected[:n]
        assert n == 30 or expected[n] in {tokenizer.encode_special(s) for s in ("<|assistant_end|>", "<|bos|>")}
    assert max(map(len, outputs)) == 30


def test_a_row_does_not_depend_on_its_neighbours(tokenizer):
    engine = Engine(make_model(tokenizer.get_vocab_size()), tokenizer, max_batch=4)

    def requests():
        return [Request(tokenizer.encode("How" * (i + 1)), 5 + 3 * i, 0.5 * i, i, seed=7, sample=i) for i in range(9)]

    together = requests()
    engine.run(together)
    for i, request in reversed(list(enumerate(requests()))):
        assert list(engine.stream(request)) == together[i].output
        assert request.finish_reason == together[i].finish_reason
    assert len({tuple(request.output[:5]) for request in together}) > 5


def test_samples_share_a_prefill_and_differ_from_the_first_token(tokenizer):
    model = make_model(tokenizer.get_vocab_size())
    lengths = []
    model.register_forward_hook(lambda module, args, output: lengths.append(tuple(args[0].shape)))
    engine = Engine(model, tokenizer)
    prompt = tokenizer.encode("How many r are in strawberry?", prepend="<|bos|>")
    sequences, masks = engine.generate_batch(prompt, num_samples=16, max_tokens=8, temperature=1.0, seed=3)
    assert lengths[0] == (1, len(prompt)) and lengths[1] == (16, 1)
    assert len({sequence[len(prompt)] for sequence in sequences}) > 3
    for sequence, mask in zip(sequences, masks, strict=True):
        assert sequence[: len(prompt)] == prompt and mask[: len(prompt)] == [0] * len(prompt)
        assert len(mask) == len(sequence)
    again, _ = engine.generate_batch(prompt, num_samples=16, max_tokens=8, temperature=1.0, seed=3)
    other, _ = engine.generate_batch(prompt, num_samples=16, max_tokens=8, temperature=1.0, seed=-3)
    assert again == sequences and other != sequences


def test_samples_follow_the_model(tokenizer):
    """Chi-square of 4,000 first tokens against the softmax of the full forward."""
    model = make_model(tokenizer.get_vocab_size(), n_layer=2)
    prompt = tokenizer.encode("What is it?", prepend="<|bos|>")
    requests = [Request(prompt, 1, 1.0, seed=5, sample=i) for i in range(4000)]
    Engine(model, tokenizer, max_batch=4000).run(requests)
    counts = collections.Counter(r.output[0] if r.output else r.stop_token for r in requests)
    with torch.inference_mode():
        probs = model(torch.tensor([prompt]))[0, -1].softmax(-1)
    likely = [token for token in range(len(probs)) if probs[token] * 4000 >= 5]
    chi2 = sum((counts[t] - 4000 * float(probs[t])) ** 2 / (4000 * float(probs[t])) for t in likely)
    assert len(likely) > 20 and chi2 < len(likely) + 5 * (2 * len(likely)) ** 0.5


def test_generate_yields_the_columns_of_generate_batch(tokenizer):
    engine = Engine(make_model(tokenizer.get_vocab_size()), tokenizer, max_batch=3)
    prompt, end = tokenizer.encode("How many"), tokenizer.encode_special("<|assistant_end|>")
    options = {"num_samples": 7, "max_tokens": 40, "temperature": 1.3, "seed": 11}
    columns = list(engine.generate(prompt, **options))
    sequences, _ = engine.generate_batch(prompt, **options)
    for i, sequence in enumerate(sequences):
        row, mask = [tokens[i] for tokens, _ in columns], [mask[i] for _, mask in columns]
        n = len(sequence) - len(prompt)
        assert row[:n] == sequence[len(prompt) :] and mask[:n] == [1] * n
        assert set(row[n + 1 :]) <= {end} and not any(mask[n + 1 :])
    assert len(columns) <= 40


def test_abandoned_requests_leave_the_engine(tokenizer):
    engine = Engine(make_model(tokenizer.get_vocab_size()), tokenizer, max_batch=2)
    prompt = tokenizer.encode("How many")
    for source in (engine.generate(prompt, num_samples=5), engine.stream(Request(prompt))):
        next(source)
        assert engine.busy
        source.close()
        assert not engine.busy


# --- stopping ---


def test_ends(tokenizer):
    special, plain = tokenizer.encode_special, tokenizer.encode("What is it? How many r are in it?")
    prompts = [(1,), (2,), (3,), (4, 4, 4)]
    answers = {
        (1,): [*plain[:4], special("<|assistant_end|>")],
        (2,): [special("<|bos|>")],
        (3,): plain,
        (4, 4, 4): plain * 50,
    }
    engine = scripted_engine(tokenizer, answers, sequence_len=40)
    requests = [Request(prompt, 6 if prompt == (3,) else None, temperature=0.0) for prompt in prompts]
    engine.run(requests)
    assert [request.output for request in requests] == [plain[:4], [], plain[:6], (plain * 50)[:37]]
    assert [request.finish_reason for request in requests] == ["stop", "stop", "length", "length"]
    assert requests[0].stop_token == special("<|assistant_end|>") and requests[1].stop_token == special("<|bos|>")
    columns = list(engine.generate((1,), temperature=0.0))
    assert columns[-1] == ([special("<|assistant_end|>")], [1])


def test_bad_requests_are_refused(tokenizer):
    engine = scripted_engine(tokenizer, {}, sequence_len=40)
    for refused in (
        {"tokens": []},
        {"max_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
    ):
        with pytest.raises(ValueError):
            Request(**{"tokens": [1], **refused})
    with pytest.raises(ValueError, match="max-batch"):
        Engine(engine.model, tokenizer, max_batch=0)
    with pytest.raises(ValueError, match="context of 40"):
        engine.add(Request([1] * 40))
    with pytest.raises(ValueError, match="context of 40"):
        engine.complete([[1], [1] * 40])
    assert not engine.busy


# --- tools ---


def test_tools_inside_a_batch(tokenizer):
    """Each row calculates at its own moment; a result is forced, read by the model, and not marked as sampled."""
    mark, end = tokenizer.encode_special, tokenizer.encode_special("<|assistant_end|>")

    def call(expression, result):
        sampled = [mark("<|python_start|>"), *tokenizer.encode(expression), mark("<|python_end|>")]
        forced = [] if result is None else [mark("<|output_start|>"), *tokenizer.encode(result), mark("<|output_end|>")]
        return sampled, forced

    wanted = {
        (1,): [call("12*12", "144")],
        (2, 2): [call("'strawberry'.count('r')", "3"), call("7+", None), call("2**8", "256")],
        (3,): [],
        (4, 4, 4): [call("__import__('os')", None)],
    }
    answers, masks = {}, {}
    for prompt, calls in wanted.items():
        text = tokenizer.encode("The result is ")
        answers[prompt], masks[prompt] = list(text), [1] * len(text)
        for sampled, forced in calls:
            answers[prompt] += sampled + forced + text
            masks[prompt] += [1] * len(sampled) + [0] * len(forced) + [1] * len(text)
        answers[prompt].append(end)
    # where a token will be forced the script says something else, so that only forcing can give the right answer
    scripts = {
        prompt: [token if sampled else 5 for token, sampled in zip(answer, [*masks[prompt], 1], strict=True)]
        for prompt, answer in answers.items()
    }
    engine = scripted_engine(tokenizer, scripts, max_batch=3)
    prompts = [(1,), (2, 2), (3,), (4, 4, 4), (2, 2), (1,)]
    requests = [Request(prompt, temperature=0.0) for prompt in prompts]
    engine.run(requests)
    for request in requests:
        assert request.output == answers[request.tokens][:-1]
        assert request.mask == masks[request.tokens]
        assert request.finish_reason == "stop"


# --- text ---


def show(tokenizer, ids):
    decoder = AnswerDecoder(tokenizer)
    return [event for token in ids for event in decoder.feed(token)] + decoder.finish()


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab é🎉🦄👨‍👩‍👧漢\u0301\n"), max_size=20))
def test_streamed_text_is_whole_characters(text):
    """Byte tokens split every emoji; the pieces shown must join to the text and never hold a broken character."""
    tokenizer = Tokenizer.train_from_iterator(["abcdefgh " * 50], 266)
    ids = [tokenizer.encode_bytes(bytes([byte]))[0] for byte in text.encode()]
    pieces = show(tokenizer, ids)
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert "".join(show(tokenizer, tokenizer.encode(text))) == text


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=30))
def test_any_bytes_decode_as_python_does(data):
    tokenizer = Tokenizer.train_from_iterator(["abcdefgh " * 50], 266)
    ids = [tokenizer.encode_bytes(bytes([byte]))[0] for byte in data]
    assert "".join(show(tokenizer, ids)) == data.decode("utf-8", errors="replace")


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


def test_a_chat_far_past_the_context_is_answered(tokenizer):
    engine = Engine(make_model(tokenizer.get_vocab_size(), sequence_len=128), tokenizer)
    messages = []
    for i in range(60):
        messages += [{"role": "user", "content": f"How many r are in {i}?"}, {"role": "assistant", "content": "Three."}]
    messages.append({"role": "user", "content": "And in this? 🎉"})
    request = engine.chat_request({"messages": messages}, temperature=0.0)
    assert request.tokens[0] == tokenizer.get_bos_token_id() and len(request.tokens) <= 96
    assert tokenizer.decode(request.tokens).endswith("And in this? 🎉<|user_end|><|assistant_start|>")
    list(engine.stream(request))
    assert request.finish_reason in ("stop", "length")
    long = engine.chat_request({"messages": [{"role": "user", "content": "strawberry " * 2000}]}, max_tokens=4)
    assert len(list(engine.stream(long))) <= 4
    with pytest.raises(ValueError):
        engine.chat_request({"messages": [{"role": "system", "content": "only this"}]})
