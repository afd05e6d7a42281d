"""Generation. Oracles: a loop written out over the full forward, a model that says what it is told, chi-square."""

import collections
import contextlib
import types
from random import Random

import pytest
import torch
from random_model import random_model

from nanochat.conversation import ChatFormat
from nanochat.cuda_graph import CudaGraphs, Graph
from nanochat.detokenizer import AnswerDecoder, ToolCall
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT
from nanochat.language_model import LayerNeed
from nanochat.tokenizer import Tokenizer

TEXTS = ["What is 12*12? The result is 144. How many r are in strawberry? Three of them, say it: 3. 🎉🦄é\n"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(TEXTS, 320)


class ScriptedModel:
    """Obeys the protocol of models and says what `script(tokens so far)` returns; only the cache remembers them."""

    whole = graphs = False  # there is nothing to pack
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, vocab_size, script, sequence_len=256):
        self.config = types.SimpleNamespace(sequence_len=sequence_len, vocab_size=vocab_size)
        self.cache_needs = [LayerNeed(1, 1, sequence_len)]
        self.script = script

    def modules(self):
        return []

    def __call__(self, idx_N, *, context, wanted_R=None):
        content = idx_N[:, None, None].float()
        context.layer(0)(content, content, content, self.config.sequence_len)
        read_RS = context.layers[0].memory[0][:, :, 0, 0]
        wanted = range(len(idx_N)) if wanted_R is None else wanted_R.tolist()
        logits = torch.full((len(wanted), self.config.vocab_size), -1e4)
        for line, n in enumerate(wanted):
            history = read_RS[context.rows_N[n], : context.positions[n] + 1].int().tolist()
            logits[line, self.script(history)] = 0.0
        return logits


def scripted_engine(tokenizer, answers, max_batch=32, **options):
    """An engine whose model continues prompt p with the ids `answers[p]`."""

    def script(history):
        prompt = next((p for p in answers if tuple(history[: len(p)]) == p), None)
        return 0 if prompt is None else answers[prompt][len(history) - len(prompt)]  # it may be in the middle of one

    return Engine(ScriptedModel(tokenizer.get_vocab_size(), script, **options), tokenizer, max_batch)


# --- generation ---


@torch.inference_mode()
def naive_greedy(model, tokens, n):
    tokens = list(tokens)
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("norm_scales", [False, True])
def test_greedy_equals_the_plain_loop(tokenizer, norm_scales):
    model = random_model(tokenizer.get_vocab_size(), norm_scales=norm_scales)
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
    engine = Engine(random_model(tokenizer.get_vocab_size()), tokenizer, max_batch=4)

    def requests():
        return [
            Request(
                tokenizer.encode("How" * (i + 1)), max_tokens=5 + 3 * i, temperature=0.5 * i, top_k=i, seed=7, sample=i
            )
            for i in range(9)
        ]

    together = requests()
    engine.run(together)
    for i, request in reversed(list(enumerate(requests()))):
        assert list(engine.stream(request)) == together[i].output
        assert request.finish_reason == together[i].finish_reason
    assert len({tuple(request.output[:5]) for request in together}) > 5


def test_samples_share_a_prefill_and_differ_from_the_first_token(tokenizer):
    model = random_model(tokenizer.get_vocab_size())
    lengths, engine = [], Engine(model, tokenizer)
    engine.trace = None  # a replayed step does not call the model
    engine.model.register_forward_pre_hook(lambda _, inputs: lengths.append(len(inputs[0])))
    prompt = tokenizer.encode("How many r are in strawberry?", prepend="<|bos|>")
    sequences, masks = engine.generate_batch(prompt, num_samples=16, max_tokens=8, temperature=1.0, seed=3)
    assert lengths[:3] == [len(prompt), 16, 16]
    assert len({sequence[len(prompt)] for sequence in sequences}) > 3
    for sequence, mask in zip(sequences, masks, strict=True):
        assert sequence[: len(prompt)] == prompt and mask[: len(prompt)] == [0] * len(prompt)
        assert len(mask) == len(sequence)
    again, _ = engine.generate_batch(prompt, num_samples=16, max_tokens=8, temperature=1.0, seed=3)
    other, _ = engine.generate_batch(prompt, num_samples=16, max_tokens=8, temperature=1.0, seed=-3)
    assert again == sequences and other != sequences


def test_a_step_is_one_forward(tokenizer):
    """Of prompts of all lengths, and of what is continued beside them; the answers are those of the plain loop."""
    model, read = random_model(tokenizer.get_vocab_size()), []
    engine = Engine(model, tokenizer, max_batch=8, step_tokens=100)
    engine.model.register_forward_pre_hook(lambda _, inputs: read.append(len(inputs[0])))
    prompts = [tokenizer.encode("How many r are in strawberry? "[: 3 + 4 * i], prepend="<|bos|>") for i in range(6)]
    requests = [Request(prompt, max_tokens=9, temperature=0.0) for prompt in prompts]
    for request in requests[:4]:
        engine.add(request)
    engine.step()
    for request in requests[4:]:
        engine.add(request)
    engine.step()
    assert read == [sum(map(len, prompts[:4])), 4 + sum(map(len, prompts[4:]))]
    while engine.busy:
        engine.step()
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output == naive_greedy(model, prompt, 9)[len(prompt) :][: len(request.output)]


def test_samples_follow_the_model(tokenizer):
    """Chi-square of 2,000 first tokens against the softmax of the full forward."""
    model = random_model(tokenizer.get_vocab_size(), n_layer=2)
    prompt = tokenizer.encode("What is it?", prepend="<|bos|>")
    requests = [Request(prompt, max_tokens=1, temperature=1.0, seed=5, sample=i) for i in range(2000)]
    Engine(model, tokenizer, max_batch=200).run(requests)
    counts = collections.Counter(r.output[0] if r.output else r.stop_token for r in requests)
    with torch.inference_mode():
        probs = model(torch.tensor([prompt]))[0, -1].softmax(-1)
    likely = [token for token in range(len(probs)) if probs[token] * 2000 >= 5]
    chi2 = sum((counts[t] - 2000 * float(probs[t])) ** 2 / (2000 * float(probs[t])) for t in likely)
    assert len(likely) > 20 and chi2 < len(likely) + 5 * (2 * len(likely)) ** 0.5


def test_generate_yields_the_columns_of_generate_batch(tokenizer):
    engine = Engine(random_model(tokenizer.get_vocab_size()), tokenizer, max_batch=3)
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
    engine = Engine(random_model(tokenizer.get_vocab_size()), tokenizer, max_batch=2)
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
    requests = [Request(prompt, max_tokens=6 if prompt == (3,) else None, temperature=0.0) for prompt in prompts]
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
    for unknown in ({"tokens": [1, -1]}, {"tokens": [10**6]}, {"logit_bias": {320: 1.0}}):
        with pytest.raises(ValueError, match="vocabulary of 320"):
            engine.add(Request(**{"tokens": [1], **unknown}))
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


def test_a_chat_far_past_the_context_is_answered(tokenizer):
    engine = Engine(random_model(tokenizer.get_vocab_size(), sequence_len=128), tokenizer)
    messages = []
    for i in range(60):
        messages += [{"role": "user", "content": f"How many r are in {i}?"}, {"role": "assistant", "content": "Three."}]
    messages.append({"role": "user", "content": "And in this? 🎉"})
    form = ChatFormat(tokenizer)
    request = Request(form.prompt(messages, engine.context), temperature=0.0)
    assert request.tokens[0] == tokenizer.get_bos_token_id() and len(request.tokens) <= 96
    assert tokenizer.decode(request.tokens).endswith("And in this? 🎉<|user_end|><|assistant_start|>")
    list(engine.stream(request))
    assert request.finish_reason in ("stop", "length")
    question = [{"role": "user", "content": "strawberry " * 2000}]
    long = Request(form.prompt(question, engine.context, 4), max_tokens=4)
    assert len(list(engine.stream(long))) <= 4
    with pytest.raises(ValueError):
        form.prompt([{"role": "system", "content": "only this"}], engine.context)


# --- what a step brings ---


def steps(engine, *requests):
    """All updates until nothing is left to do."""
    for request in requests:
        engine.add(request)
    updates = []
    while engine.busy:
        updates += engine.step()
    return updates


def test_stop_texts_end_an_answer_and_never_show(tokenizer):
    answers = {(1,): tokenizer.encode("The result is 144. How many r are in it?") * 3, (2,): tokenizer.encode("Three")}
    answers[2,].append(tokenizer.encode_special("<|assistant_end|>"))
    engine = scripted_engine(tokenizer, answers)
    for stop, shown in ((["144"], "The result is "), (["many r", "zzz"], "The result is 144. How "), (["The"], "")):
        request = Request((1,), max_tokens=60, temperature=0.0, stop=stop)
        updates = steps(engine, request)
        assert request.finish_reason == "stop" and request.stop_token is None
        assert "".join(event for update in updates for event in update.events) == shown
        assert not any(text in tokenizer.decode(request.output[:-1]) for text in stop)  # it ended as soon as it could
    request = Request((2,), temperature=0.0, stop=["Threefold"])
    updates = steps(engine, request)
    assert "".join(event for update in updates for event in update.events) == "Three"  # held back, then let go
    assert [update.finish_reason for update in updates][-1] == "stop" and request.stop_token is not None


def test_updates_are_the_output_in_order(tokenizer):
    """With all kinds of company; tokens and text as in the end, and one last update with the reason for each."""
    engine = Engine(random_model(tokenizer.get_vocab_size()), tokenizer, max_batch=3)
    requests = [Request(tokenizer.encode("How" * (i + 1)), max_tokens=5 + 4 * i, seed=i) for i in range(7)]
    for request in requests:
        request.decoder = AnswerDecoder(tokenizer)
    updates = steps(engine, *requests)
    for request in requests:
        mine = [update for update in updates if update.request is request]
        assert [token for update in mine for token in update.tokens] == request.output
        decoder = AnswerDecoder(tokenizer)
        events = [event for token in request.output for event in decoder.feed(token)] + decoder.finish()
        assert [event for update in mine for event in update.events] == events
        assert [update.finish_reason for update in mine] == [None] * (len(mine) - 1) + [request.finish_reason]
        assert len(request.output) == len(request.mask) <= request.max_tokens
    stats = engine.stats()
    assert stats["output_tokens"] == sum(len(request.output) for request in requests)
    assert stats["prompt_tokens"] == sum(len(request.tokens) for request in requests)
    assert stats["running"] == stats["waiting"] == stats["cache_tokens"] == 0


def test_a_tools_answer_is_read_at_once_and_cut_at_the_limit(tokenizer):
    mark, end = tokenizer.encode_special, tokenizer.encode_special("<|assistant_end|>")
    call = [mark("<|python_start|>"), *tokenizer.encode("2**70"), mark("<|python_end|>")]
    result = [mark("<|output_start|>"), *tokenizer.encode(str(2**70)), mark("<|output_end|>")]
    engine = scripted_engine(tokenizer, {(1,): [*call, *(5 for _ in result), end]})
    request = Request((1,), temperature=0.0, decoder=AnswerDecoder(tokenizer))
    updates = steps(engine, request)
    assert request.output == call + result and len(updates) == len(call) + 1
    assert [event for update in updates for event in update.events] == [ToolCall("2**70", str(2**70))]
    for n in range(len(call), len(call) + len(result)):
        cut = Request((1,), max_tokens=n, temperature=0.0)
        engine.run([cut])
        assert cut.output == (call + result)[:n] and cut.finish_reason == "length"
        assert cut.mask == [1] * len(call) + [0] * (n - len(call))


def test_logprobs_of_an_answer_are_those_of_the_full_forward(tokenizer):
    model = random_model(tokenizer.get_vocab_size())
    prompt = tokenizer.encode("How many r are in strawberry?", prepend="<|bos|>")
    request = Request(prompt, max_tokens=20, seed=3, logprobs=4)
    Engine(model, tokenizer).run([request])
    with torch.inference_mode():
        logprobs = model(torch.tensor([[*prompt, *request.output]]))[0].log_softmax(-1)
    assert [score.token for score in request.scores] == request.output
    for score, expected_V in zip(request.scores, logprobs[len(prompt) - 1 :], strict=False):
        assert score.logprob == pytest.approx(expected_V[score.token].item(), abs=1e-3)
        top = expected_V.topk(4)
        assert list(score.top.values()) == pytest.approx(top.values.tolist(), abs=1e-3)


def test_aborting_at_any_moment_frees_the_slot_and_spoils_nothing(tokenizer):
    model = random_model(tokenizer.get_vocab_size())
    prompts = [tokenizer.encode("How many r " * (5 + 12 * (i % 5)), prepend="<|bos|>") for i in range(12)]
    expected = Engine(model, tokenizer).complete(prompts, max_tokens=12)
    engine = Engine(model, tokenizer, max_batch=4, step_tokens=16)
    requests = [Request(prompt, max_tokens=12, temperature=0.0) for prompt in prompts]
    for request in requests:
        engine.add(request)
    random, seen = Random(0), set()
    while engine.busy:
        engine.step()
        alive = [request for request in requests if request.finish_reason is None]
        if alive and random.random() < 0.4 and len(alive) > 4:
            victim = random.choice(alive)
            seen.add(victim.state)
            engine.abort(victim)
            engine.abort(victim)
            assert victim.state == "done" and victim.finish_reason == "abort"
            assert victim not in engine.running and victim not in engine.waiting
    assert seen == {"waiting", "prefill", "decode"}
    for request, output in zip(requests, expected, strict=True):
        assert request.output == output[: len(request.output)]
        assert request.finish_reason == "abort" or request.output == output


def test_a_cache_with_little_room(tokenizer):
    """Fewer run at a time, and all end as they do with plenty; what can never fit is refused when it comes."""
    model = random_model(tokenizer.get_vocab_size())
    prompts = [tokenizer.encode("How many r " * (16 + 4 * i)) for i in range(6)]
    assert all(40 < len(prompt) < 120 for prompt in prompts)
    expected = Engine(model, tokenizer, prefix_tokens=0).complete(prompts, max_tokens=80)
    engine = Engine(model, tokenizer, max_batch=6, cache_tokens=600, prefix_tokens=0)
    assert engine.complete(prompts, max_tokens=80) == expected
    assert engine.scheduler.n_preempted and engine.cache.n_rows * engine.cache.n_slots <= 600
    small = Engine(model, tokenizer, cache_tokens=130)
    with pytest.raises(ValueError, match="max_tokens"):
        small.add(Request(prompts[-1], max_tokens=80))
    assert engine.bytes_per_token == 4 * 2 * 2 * 16 * 4


def test_int8_weights_are_near_and_refused_where_they_cannot_be(tokenizer):
    model = random_model(tokenizer.get_vocab_size(), dtype=torch.bfloat16)
    prompt = tokenizer.encode("How many r are in strawberry?")
    scores = []
    for int8 in (False, True):
        request = Request(prompt, max_tokens=1, temperature=0.0, logprobs=10)
        Engine(model, tokenizer, int8=int8).run([request])
        scores.append(request.scores[0].top)
    both = scores[0].keys() & scores[1].keys()
    assert scores[0] != scores[1] and len(both) >= 7
    assert max(abs(scores[0][token] - scores[1][token]) for token in both) < 0.5
    with pytest.raises(ValueError, match="bfloat16"):
        Engine(random_model(), tokenizer, int8=True)
    with pytest.raises(ValueError, match="int8 weights need"):
        Engine(scripted_engine(tokenizer, {}).model, tokenizer, int8=True)


def test_a_model_that_is_not_packed_gives_the_same(tokenizer, monkeypatch):
    model = random_model(tokenizer.get_vocab_size())
    prompts = [tokenizer.encode("How many r " * (1 + 9 * i), prepend="<|bos|>") for i in range(5)]
    expected = Engine(model, tokenizer, max_batch=3).complete(prompts, max_tokens=30)
    monkeypatch.setattr(GPT, "whole", False)
    engine = Engine(model, tokenizer, max_batch=3, step_tokens=40)
    assert engine.model is model
    assert engine.complete(prompts, max_tokens=30) == expected


def test_an_engine_keeps_the_weights_of_its_making(tokenizer):
    """Training may go on meanwhile: neither the model nor the engine sees anything of the other."""
    model = random_model(tokenizer.get_vocab_size())
    names = set(model.state_dict())
    prompt = tokenizer.encode("How many r are in it?", prepend="<|bos|>")
    engine = Engine(model, tokenizer)
    before = engine.complete([prompt], max_tokens=20)
    assert set(model.state_dict()) == names
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.up.weight.add_(1.0)
    assert engine.complete([prompt], max_tokens=20) == before
    assert Engine(model, tokenizer).complete([prompt], max_tokens=20) != before


def test_the_shapes_of_graphs_give_the_same(tokenizer):
    """What a GPU replays, run as it is: rows to a power of two with idle ones, slots to a power of two."""
    model = random_model(tokenizer.get_vocab_size(), sequence_len=768)
    prompts = [tokenizer.encode("How many r " * (1 + 20 * (i % 4)), prepend="<|bos|>") for i in range(9)]
    expected = Engine(model, tokenizer).complete(prompts, max_tokens=40)
    engine = Engine(model, tokenizer, max_batch=5, step_tokens=32)
    shapes = set()

    class Uncaptured(CudaGraphs):
        """Runs the step anew when it is replayed."""

        def _capture(self, inputs_4N, length):
            static_4N = inputs_4N.clone()
            logits_NV = self._step(static_4N, length).clone()
            shapes.add((static_4N.size(1), length))
            graph = types.SimpleNamespace(replay=lambda: logits_NV.copy_(self._step(static_4N, length)))
            return Graph(graph, static_4N, logits_NV)

    engine.graphs = Uncaptured(engine.model, engine.cache)
    assert engine.complete(prompts, max_tokens=40) == expected
    assert {rows for rows, _ in shapes} <= {1, 2, 4, 8} and len(shapes) >= 4


def test_a_graph_is_captured_beside_threads_that_allocate(tokenizer, monkeypatch):
    """Capture forbids allocation to its own thread alone: the engines of other GPUs run on threads beside it."""
    modes = []

    def capture(graph, capture_error_mode="global"):
        modes.append(capture_error_mode)
        return contextlib.nullcontext()

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None))
    engine = Engine(random_model(tokenizer.get_vocab_size()), tokenizer, max_batch=2)
    CudaGraphs(engine.model, engine.cache)([(5, -1, 0, 0)])
    assert modes == ["thread_local"]
