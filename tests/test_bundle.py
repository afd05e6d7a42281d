"""Bundles: our checkpoints for transformers, which is their oracle; by its own class and with code of ours."""

import dataclasses
import json
import os

import pytest
import tiny_run
import torch
from random_model import random_model

pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")
import transformers
from safetensors.torch import load_file

from nanochat import checkpoint
from nanochat.compute import Compute
from nanochat.conversation import render_for_completion, text_prompt
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.hf import convert
from nanochat.hf.modeling_nanochat import norm
from nanochat.hf.tokenizer_convert import to_tokenizer_json
from nanochat.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["The quick brown fox, it's 12345!\n\n", "Grüße aus 東京 👩‍👩‍👧 — naïve", "def f(x):\n    return x**2\n"] * 30
SHAPE = {"sequence_len": 256, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
PLAIN = {**convert.PLAIN_SWITCHES, "window_pattern": "L"}  # what transformers' own class can express
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": [{"type": "python", "text": "2+2"}, {"type": "python_output", "text": "4"}]},
    {"role": "user", "content": "  Grüße {{ 1 }} "},
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(TEXTS, 400)


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    return tmp_path / "base"


def save_random(tokenizer, folder, **changes):
    """A random model, also as the checkpoint base/x, with its tokenizer."""
    model = random_model(tokenizer.get_vocab_size(), **{**SHAPE, **changes})
    with torch.no_grad():
        if changes.get("embed_skip_last") == 0:  # off, which these weights must show as well
            model.resid_scale.fill_(1.0)
            model.embed_skip.fill_(0.0)
    tokenizer.save(folder / "tokenizer")
    meta = {"model_config": dataclasses.asdict(model.config), "tokenizer_hash": tokenizer.hash}
    compute = Compute(torch.device("cpu"), torch.float32)
    checkpoint.save("base", "x", step=1, model=model, optimizer_state=None, meta=meta, compute=compute)
    return model


@pytest.fixture(scope="module", params=["code", "nanochat"])
def bundle(request, tokenizer, tmp_path_factory):
    """(our model, theirs, their tokenizer): every switch on, in a bundle with code, or every switch off."""
    folder = tmp_path_factory.mktemp("bundle")
    with tiny_run.base_dir(folder / "base"):
        model = save_random(tokenizer, folder / "base", **(PLAIN if request.param == "nanochat" else {}))
        convert.export_checkpoint(folder / "bundle", "base", "x")
    theirs = from_bundle(folder / "bundle")
    assert ("trust_remote_code" in (folder / "bundle" / "README.md").read_text()) == (request.param == "code")
    return model, theirs, transformers.AutoTokenizer.from_pretrained(folder / "bundle")


def greedy(model, prompt, count):
    row = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None)[0]
    return row[len(prompt) :].tolist()


def prompts(vocab_size, *lengths):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def same(ours, tokenizer, theirs, tolerance=1e-4):
    """Equal logits, and equal greedy tokens from the engine here and from generate there."""
    batch = prompts(ours.config.vocab_size, 7, 160)
    for prompt in batch:
        wanted = theirs(torch.tensor([prompt])).logits
        assert (ours(torch.tensor([prompt])) - wanted).abs().max() / wanted.abs().max() < tolerance
    engine = Engine(ours, tokenizer)
    engine._stop_tokens = set()
    assert engine.complete(batch, 20) == [greedy(theirs, prompt, 20) for prompt in batch]


@torch.no_grad()
def test_transformers_nanochat_and_back(base, tmp_path, tokenizer):
    """A folder that transformers saved becomes a checkpoint; exported again, it is the same for transformers."""
    config = transformers.NanoChatConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    theirs = transformers.NanoChatForCausalLM(config).eval()
    for value in theirs.parameters():
        value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())) * 0.15)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    (tmp_path / "theirs" / "tokenizer.json").write_text(to_tokenizer_json(tokenizer))
    convert.import_checkpoint(tmp_path / "theirs", "sft", "theirs")
    model, ours, _ = checkpoint.load_model("sft", "cpu", "theirs")
    assert ours.get_vocab_size() == tokenizer.get_vocab_size()
    assert [ours.encode(text) for text in TEXTS[:3]] == [tokenizer.encode(text) for text in TEXTS[:3]]
    same(model, ours, theirs)
    convert.export_checkpoint(tmp_path / "again", "sft", "theirs")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "nanochat"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert type(again) is type(theirs)
    same(model, ours, again)


@pytest.fixture
def exported(trained_world, monkeypatch, tmp_path):
    """A trained model of the present architecture, and its bundle."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    convert.export_checkpoint(tmp_path / "bundle", "mid", None)
    return tmp_path / "bundle"


def from_bundle(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)


@torch.no_grad()
def test_bundle_with_its_own_code(exported, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, tokenizer, meta = checkpoint.load_model("mid", "cpu")
    theirs = from_bundle(exported)
    batch = prompts(model.config.vocab_size, 5, 30)
    for prompt in batch:
        wanted = theirs(torch.tensor([prompt])).logits
        assert (model(torch.tensor([prompt])) - wanted).abs().max() / wanted.abs().max() < 1e-4
    engine = Engine(model, tokenizer)
    engine._stop_tokens = set()
    assert engine.complete(batch, 20) == [greedy(theirs, prompt, 20) for prompt in batch]
    padded = torch.tensor([[0] * 25 + batch[0], batch[1]])
    mask = torch.tensor([[0] * 25 + [1] * 5, [1] * 30])
    logits = theirs(padded, attention_mask=mask).logits[0, 25:]
    torch.testing.assert_close(logits, theirs(torch.tensor([batch[0]])).logits[0], atol=1e-4, rtol=1e-4)
    hashes = json.loads((exported / "hashes.json").read_text())
    assert hashes["step"] == meta["step"] and "model.safetensors" in hashes["sha256"]
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "elsewhere"))
    convert.import_checkpoint(exported, "sft", "back")
    back, tokenizer_back, _ = checkpoint.load_model("sft", "cpu", "back")
    assert tokenizer_back.hash == tokenizer.hash
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in back.state_dict().items())


@torch.no_grad()
def test_scales_of_norms_need_a_bundle_with_code(base, tmp_path, tokenizer):
    """transformers' class has no such scales: it is refused even where all else is of 2025; our own code has them."""
    model = save_random(tokenizer, base, **PLAIN, norm_scales=True)
    with pytest.raises(ValueError, match="--format code"):
        convert.export_checkpoint(tmp_path / "refused", "base", "x", format="nanochat")
    convert.export_checkpoint(tmp_path / "bundle", "base", "x")
    same(model, tokenizer, from_bundle(tmp_path / "bundle"))


@torch.no_grad()
def test_random_weights(bundle, tokenizer):
    """Every weight large, past short windows."""
    model, theirs, _ = bundle
    same(model, tokenizer, theirs)


@torch.no_grad()
def test_plain_text_is_continued_as_the_engine_does(bundle, tokenizer):
    """The bundle's tokenizer begins a text as training did, and pads a batch so that nothing changes."""
    model, theirs, their_tokenizer = bundle
    texts = ["The quick brown fox", "def f(x):\n    return"]
    wanted = Engine(model, tokenizer).complete([text_prompt(text, tokenizer) for text in texts], 12)
    batch = their_tokenizer(texts, padding=True, return_tensors="pt")
    assert batch.input_ids[0, -1] != batch.input_ids[0, 0] == tokenizer.get_bos_token_id()
    rows = theirs.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch.input_ids.size(1) :].tolist()
    ends = {tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()}
    assert [[token for token in row if token not in ends] for row in rows] == wanted
    assert their_tokenizer("a", "b").input_ids == tokenizer.encode("a", "<|bos|>") + tokenizer.encode("b", "<|bos|>")


def test_padding_is_not_learned_and_all_else_is(bundle, tokenizer):
    _, _, their_tokenizer = bundle
    collator = transformers.DataCollatorForLanguageModeling(their_tokenizer, mlm=False)
    chats = [render_for_completion({"messages": talk}, tokenizer) for talk in (TALK[1:2], TALK)]
    labels = collator([{"input_ids": ids} for ids in chats])["labels"]
    for ids, row in zip(chats, labels.tolist()):
        assert [label for label in row if label != -100] == ids[1:], "all but <|bos|>, which nothing predicts"


def examples(n_rows=8):
    """Rows of other lengths, whose beginnings are padding."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(n_rows):
        n_padding = 32 - 8 - 3 * i
        ids = torch.randint(300, (32,), generator=generator)
        labels = ids.clone()
        labels[:n_padding] = -100
        mask = torch.ones_like(ids)
        mask[:n_padding] = 0
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def loss_and_gradient(model, rows, size):
    """The loss of a step over micro-batches of so many rows, and its gradient, as transformers' Trainer makes them."""
    model.zero_grad()
    n_items = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    total = 0.0
    for i in range(0, len(rows), size):
        batch = {name: torch.stack([row[name] for row in rows[i : i + size]]) for name in rows[0]}
        loss = model(**batch, num_items_in_batch=torch.tensor(n_items)).loss
        loss.backward()
        total += loss.item()
    return total, torch.cat([value.grad.flatten() for value in model.parameters()])


def test_the_loss_does_not_depend_on_micro_batches(bundle):
    """torch's cross-entropy over all rows is the oracle, with and without the number of tokens in a step."""
    _, theirs, _ = bundle
    rows = examples()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    out = theirs(**batch)
    wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:])
    torch.testing.assert_close(out.loss, wanted)
    whole, gradient = loss_and_gradient(theirs, rows, 8)
    assert whole == pytest.approx(wanted.item(), rel=1e-5)
    for size in (1, 2, 4):
        loss, parts = loss_and_gradient(theirs, rows, size)
        assert loss == pytest.approx(whole, rel=1e-5)
        torch.testing.assert_close(parts, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


def test_gradient_checkpointing_recomputes(bundle):
    model, theirs, _ = bundle
    mlp = theirs.get_submodule("blocks.1.mlp" if model.config.smear_channels else "model.layers.1.mlp")
    passes = []
    hook = mlp.register_forward_pre_hook(lambda module, inputs: passes.append(inputs))
    theirs.train()
    wanted = loss_and_gradient(theirs, examples(2), 2)
    assert len(passes) == 1
    theirs.gradient_checkpointing_enable()
    loss, gradient = loss_and_gradient(theirs, examples(2), 2)
    assert len(passes) == 3, "one pass before, and two with it"
    assert loss == wanted[0]
    torch.testing.assert_close(gradient, wanted[1])
    theirs.gradient_checkpointing_disable()
    hook.remove()
    theirs.eval()


def test_the_trainer_of_transformers(bundle, tmp_path):
    """One step on 8 rows in 1 and in 4 micro-batches, with gradient checkpointing in the latter."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    _, theirs, _ = bundle
    seen = []
    for n_parts in (1, 4):
        arguments = transformers.TrainingArguments(
            tmp_path,
            per_device_train_batch_size=8 // n_parts,
            gradient_accumulation_steps=n_parts,
            gradient_checkpointing=n_parts > 1,
            max_steps=1,
            learning_rate=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        )
        trainer = transformers.Trainer(theirs, arguments, train_dataset=examples())
        trainer.train()
        log = trainer.state.log_history[0]
        seen.append((log["loss"], log["grad_norm"]))
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)
    theirs.eval()


@torch.no_grad()
def test_embeddings_as_input(bundle):
    """They stand for their tokens, value embeddings too; a vector that is no token's has none of those."""
    _, theirs, _ = bundle
    ids = torch.tensor(prompts(300, 30, 30))
    embeds = theirs.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    wanted = theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(theirs(inputs_embeds=embeds, attention_mask=mask).logits, wanted)
    soft = embeds.clone()
    soft[:, 3] += 0.25
    logits = theirs(inputs_embeds=soft).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:, :3], theirs(ids).logits[:, :3])


@torch.no_grad()
def test_generation_from_embeddings(bundle):
    """As from the tokens they stand for, in a batch with padding, with the tokens beside them and without."""
    _, theirs, _ = bundle
    ids = torch.tensor(prompts(300, 30, 30))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    wanted = theirs.generate(ids, **options)
    embeds = theirs.get_input_embeddings()(ids)
    assert theirs.generate(inputs_embeds=embeds, **options).tolist() == wanted[:, 30:].tolist()
    assert theirs.generate(ids, inputs_embeds=embeds, **options).tolist() == wanted.tolist()


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(bundle):
    """Rows as DataCollatorWithFlattening packs them: positions begin anew with each document."""
    _, theirs, _ = bundle
    theirs.train()  # transformers' own class looks for documents where it keeps no cache
    documents = [torch.tensor([ids]) for ids in prompts(300, 9, 1, 20)]
    positions = torch.cat([torch.arange(ids.size(1)) for ids in documents])[None]
    logits = theirs(torch.cat(documents, dim=1), position_ids=positions, use_cache=False).logits
    wanted = torch.cat([theirs(ids, use_cache=False).logits for ids in documents], dim=1)
    theirs.eval()
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)


def test_norms_in_bfloat16_have_the_epsilon_of_training():
    """RMSNorm written out, in fp32, of small numbers."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.1
    wanted = x.float() / (x.float().square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    torch.testing.assert_close(norm(x).float(), wanted, rtol=0.01, atol=0.01)


def test_tokenizer_and_template_of_a_bundle(exported):
    ours, theirs = load_tokenizer(), transformers.AutoTokenizer.from_pretrained(exported)
    for text in [*TEXTS[:3], "<b> & '12345'", " " * 300 + "x", "\n\n\n  a"]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    for messages in (TALK, TALK[1:2], TALK[1:]):
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == render_for_completion({"messages": messages}, ours)
    assert theirs.eos_token_id == ours.encode_special("<|assistant_end|>")


def test_what_cannot_be_exported_is_said(trained_world, tmp_path):
    with pytest.raises(ValueError, match=r"llama\.cpp"):
        convert.export_checkpoint(tmp_path / "x", "mid", None, format="gguf")
    with pytest.raises(ValueError, match="--format code"):
        convert.export_checkpoint(tmp_path / "x", "mid", None, format="nanochat")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        convert.export_checkpoint(tmp_path / "full", "mid", None)
    assert os.listdir(tmp_path / "full") == ["file"]


def test_command_line(trained_world, tmp_path):
    out = tiny_run.run("scripts.models", "export", str(tmp_path / "bundle"), "--stage", "mid").out
    assert "trust_remote_code=True" in out
    tiny_run.run("scripts.models", "import", str(tmp_path / "bundle"), "--stage", "sft", "--tag", "back")
    assert checkpoint.list_steps("sft", "back") == [0]
    line = tiny_run.script("scripts.models", "import", str(tmp_path), "--stage", "sft", "--tag", "no").error_line
    assert "nothing to import" in line
    assert (
        load_file(tmp_path / "bundle" / "model.safetensors").keys()
        == GPT(GPTConfig.from_dict(json.loads((tmp_path / "bundle" / "config.json").read_text())["gpt"]))
        .state_dict()
        .keys()
    )
