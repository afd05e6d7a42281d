"""Loss on text against closed forms and against plain sums of log-probabilities."""

import math
import types

import pytest
import torch

from nanochat import dataset
from nanochat.compute import Compute
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import evaluate_loss
from nanochat.tokenizer import Tokenizer
from scripts.base_eval import Config, text_batches

VOCAB = 40
TOKEN_BYTES = [0, 0, *(1 + i % 5 for i in range(VOCAB - 2))]  # two specials


def uniform(idx_BT, targets_BT, loss_reduction):
    """A model that finds every token equally likely."""
    assert loss_reduction == "none"
    return torch.where(targets_BT >= 0, math.log(VOCAB), 0.0)


def random_batches(n=3, B=2, T=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    idx_NBT = torch.randint(0, VOCAB, (n, B, T), generator=generator)
    targets_NBT = torch.randint(-1, VOCAB, (n, B, T), generator=generator)
    return list(zip(idx_NBT, targets_NBT))


def tiny_model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=16, vocab_size=VOCAB, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_a_uniform_model_needs_log2_vocabulary_bits_a_token():
    batches = random_batches()
    targets = torch.cat([t.flatten() for _, t in batches])
    text = [i for i in targets.tolist() if i >= 2]
    expected = len(text) * math.log2(VOCAB) / sum(TOKEN_BYTES[i] for i in text)
    loss = evaluate_loss(uniform, batches, TOKEN_BYTES)
    assert loss.bits_per_byte == pytest.approx(expected, rel=1e-6)
    assert loss.nats_per_token == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert loss.perplexity == pytest.approx(VOCAB, rel=1e-6)


def test_a_model_agrees_with_its_own_logits_summed_one_by_one():
    model, batches = tiny_model(), random_batches()
    bits = nats = count = n_tokens = 0
    for idx_BT, targets_BT in batches:
        for idx_T, targets_T in zip(idx_BT, targets_BT):
            logp_TV = model(idx_T[None])[0].double().log_softmax(-1)
            for t, target in enumerate(targets_T.tolist()):
                if target >= 0:
                    nats -= logp_TV[t, target].item()
                    n_tokens += 1
                if target >= 0 and TOKEN_BYTES[target]:
                    bits -= logp_TV[t, target].item() / math.log(2)
                    count += TOKEN_BYTES[target]
    loss = evaluate_loss(model, batches, TOKEN_BYTES)
    assert loss.bits_per_byte == pytest.approx(bits / count, rel=1e-5)
    assert loss.nats_per_token == pytest.approx(nats / n_tokens, rel=1e-5)
    assert loss.perplexity == pytest.approx(math.exp(nats / n_tokens), rel=1e-4)


def test_special_tokens_do_not_count_in_bits_even_with_infinite_loss():
    def infinite_on_specials(idx_BT, targets_BT, loss_reduction):
        return uniform(idx_BT, targets_BT, loss_reduction).masked_fill(targets_BT < 2, math.inf)

    batches = random_batches()
    expected = evaluate_loss(uniform, batches, TOKEN_BYTES).bits_per_byte
    assert evaluate_loss(infinite_on_specials, batches, TOKEN_BYTES).bits_per_byte == expected


def test_the_division_into_batches_and_the_form_of_the_byte_table_do_not_matter():
    model, batches = tiny_model(), random_batches(n=4)
    whole = [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]
    compute = Compute(torch.device("cpu"), torch.float32)
    table = torch.tensor(TOKEN_BYTES)
    one = evaluate_loss(model, whole, table, compute)
    other = evaluate_loss(model, iter(batches), TOKEN_BYTES)
    assert one.bits_per_byte == pytest.approx(other.bits_per_byte, rel=1e-6)
    assert one.nats_per_token == pytest.approx(other.nats_per_token, rel=1e-6)


@pytest.mark.parametrize("batches", [[], [(torch.zeros(1, 4).long(), torch.tensor([[-1, -1, 0, 1]]))]])
def test_nothing_to_score_is_an_error(batches):
    with pytest.raises(ValueError, match="not one byte"):
        evaluate_loss(uniform, batches, TOKEN_BYTES)


def test_no_graph_is_built():
    model, seen = tiny_model(), []

    def spy(*args, **kwargs):
        seen.append(model(*args, **kwargs))
        return seen[-1]

    evaluate_loss(spy, random_batches(), TOKEN_BYTES)
    assert seen and not any(loss.requires_grad for loss in seen)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_text_that_is_scored_does_not_depend_on_ranks_and_batches(tmp_path, monkeypatch, split):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "texts").mkdir()
    for i in range(60):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(" ".join(f"{i} times {j} is {i * j}." for j in range(20)))
    name = str(tmp_path / "texts")
    dataset.prepare(name)
    tokenizer = Tokenizer.train_from_iterator(["one times one is one"], 270)
    model = types.SimpleNamespace(config=GPTConfig(sequence_len=32))

    def rows(device_batch_size, ranks):
        config = Config(device_batch_size=device_batch_size, eval_tokens=32 * 13 - 5)
        found = []
        for rank in range(ranks):
            compute = Compute(torch.device("cpu"), torch.float32, rank, ranks)
            for inputs_BT, targets_BT in text_batches(config, name, split, model, tokenizer, compute):
                found += [(*x, y[-1]) for x, y in zip(inputs_BT.tolist(), targets_BT.tolist()) if max(y) >= 0]
        return sorted(found)

    alone = rows(4, 1)
    assert len(alone) == len(set(alone)) == 13
    assert rows(16, 1) == rows(2, 3) == rows(5, 4) == alone
