"""Chat evaluation against direct scoring, one prompt at a time, and against answers that are known in advance."""

import math

import pytest
import torch

from nanochat.chat_eval import chat_core, choose_letters, evaluate_task
from nanochat.conversation import render_for_completion
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from scripts.chat_eval import TASKS, Config
from tasks.arithmetic import Arithmetic
from tasks.common import Task, single_turn
from tasks.world import WorldChoice, WorldFacts


@pytest.fixture(scope="module")
def tokenizer():
    facts = WorldFacts("test")
    return Tokenizer.train_from_iterator((facts[i]["messages"][0]["content"] for i in range(50)), 400)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = GPTConfig(
        sequence_len=256, vocab_size=tokenizer.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=1, n_embd=32
    )
    model = GPT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


class Recital:
    """An engine that knows what to say: the answer of each problem, from the end of the prompt."""

    def __init__(self, task, tokenizer, wrong=()):
        self.answers, self.calls = {}, []
        for i in range(len(task)):
            ids = render_for_completion(task[i], tokenizer)
            self.answers[tuple(ids)] = tokenizer.encode("no idea" if i in wrong else task[i]["messages"][-1]["content"])

    def complete(self, prompts, max_tokens, temperature):
        self.calls.append((len(prompts), max_tokens, temperature))
        return [self.answers[tuple(ids)] for ids in prompts]


class Letters(Task):
    """Ten questions of growing length whose right letter is always B, so that the score is the share of B."""

    name, eval_type, baseline = "letters", "categorical", 0.25

    def example(self, index):
        return single_turn("qzx " * 16 * (index + 1), "B", letters=list("ABCD"))

    def evaluate(self, conversation, completion):
        return completion == conversation["messages"][-1]["content"]


def likeliest_letter(model, tokenizer, conversation):
    ids = render_for_completion(conversation, tokenizer)
    ids = [ids[0], *ids[1:][-(model.config.sequence_len - 1) :]]
    with torch.no_grad():
        logits_V = model(torch.tensor([ids]))[0, -1]
    return max(conversation["letters"], key=lambda letter: logits_V[tokenizer.encode(letter)[0]])


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_categorical_batches_choose_as_one_prompt_at_a_time(model, tokenizer, batch_size):
    task = WorldChoice("test")
    n = 40
    expected = [task.evaluate(task[i], likeliest_letter(model, tokenizer, task[i])) for i in range(n)]
    record = evaluate_task(task, model, tokenizer, None, max_problems=n, batch_size=batch_size)
    assert record["accuracy"] == sum(expected) / n and record["n"] == n and record["baseline"] == 0.25
    assert [sample["correct"] for sample in record["samples"]] == expected[:3]
    assert 0 < sum(expected) < n


def test_only_the_letters_offered_are_compared(model, tokenizer):
    def favours(idx_BT):  # BOS above all, then C, then A
        logits_BTV = torch.zeros(*idx_BT.shape, tokenizer.get_vocab_size())
        for token, value in ((tokenizer.get_bos_token_id(), 9.0), (tokenizer.encode("C")[0], 5.0)):
            logits_BTV[..., token] = value
        return logits_BTV

    favours.device = "cpu"
    letters = [list("ABCD"), list("AB"), list("BA")]
    assert choose_letters(favours, tokenizer, [[1], [1, 2], [3]], letters) == ["C", "A", "B"]  # ties: the first
    with pytest.raises(ValueError, match="one token"):
        choose_letters(favours, tokenizer, [[1]], [["A", "\N{SNOWMAN}"]])


def test_generative_answers_are_decoded_and_judged(model, tokenizer):
    task = WorldFacts("test", size=30)
    engine = Recital(task, tokenizer, wrong={0, 7})
    record = evaluate_task(task, model, tokenizer, engine, batch_size=5, max_new_tokens=50)
    p = 28 / 30
    assert record["accuracy"] == p and record["centered"] == p
    assert record["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 30))
    assert sum(n for n, _, _ in engine.calls) == 30
    assert all(call[1:] == (50, 0.0) for call in engine.calls)
    question, answer = (message["content"] for message in task[1]["messages"])
    assert record["samples"][0]["answer"] == "no idea" and not record["samples"][0]["correct"]
    assert record["samples"][1] == {"question": question, "answer": answer, "correct": True}


def test_the_real_engine_and_an_untrained_model_run_to_the_end(model, tokenizer):
    engine = Engine(model, tokenizer, max_batch=4)
    record = evaluate_task(
        Arithmetic("test"), model, tokenizer, engine, max_problems=6, batch_size=4, max_new_tokens=8, progress=list
    )
    assert record["n"] == 6 and record["accuracy"] == 0 and len(record["samples"]) == 3


def test_prompts_beyond_the_context_lose_their_beginning_and_still_run(model, tokenizer):
    letters = Letters(10)
    longest = len(render_for_completion(letters[9], tokenizer))
    assert longest > model.config.sequence_len
    expected = sum(likeliest_letter(model, tokenizer, letters[i]) == "B" for i in range(10))
    assert evaluate_task(letters, model, tokenizer, None)["accuracy"] == expected / 10
    engine = Engine(model, tokenizer, max_batch=4)
    long_questions = Letters(10)
    long_questions.eval_type = "generative"
    assert evaluate_task(long_questions, model, tokenizer, engine, max_new_tokens=1000, batch_size=10)["n"] == 10


def test_chat_core_is_the_mean_centred_accuracy():
    assert chat_core([{"centered": 1.0}, {"centered": -0.25}]) == 0.375


def test_a_task_without_problems_is_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="no problems"):
        evaluate_task(Letters(0), model, tokenizer, None)


def test_the_script_knows_its_tasks_and_refuses_what_cannot_be():
    assert Config().task_names == list(TASKS) and all(len(task("test")) > 0 for task in TASKS.values())
    for wrong, named in (({"tasks": "choice,chess"}, "chess"), ({"batch_size": 0}, "--batch-size 0")):
        with pytest.raises(ValueError, match=named):
            Config(**wrong)
