"""The stages one after the other on a tiny world: what each leaves behind, and that the next one reads it."""

import json
import math

import pytest
import torch
from record_check import check_records
from safetensors.torch import load_file
from tiny_run import BASE, SKILLS, STEPS, losses, metrics, run

from nanochat import checkpoint
from nanochat.engine import Engine
from nanochat.hf.convert import export_checkpoint

SCRIPTS = {"base": "scripts.base_train", "mid": "scripts.mid_train", "sft": "scripts.chat_sft"}


@pytest.fixture(scope="module")
def finished(module_world):
    """The world with all three stages in it, and the output of each."""
    out = {}
    for stage, script in SCRIPTS.items():
        flags = BASE if stage == "base" else SKILLS
        out[stage] = run(script, *flags, *STEPS, "--num-iterations", "6", "--eval-every", "3").out
    return module_world, out


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_stage_leaves_checkpoints_metrics_and_a_record(finished, stage):
    base, out = finished
    assert checkpoint.list_steps(stage, "d2") == [3, 6]
    model, _, meta = checkpoint.load_model(stage, "cpu")
    assert (meta["stage"], meta["tag"], meta["step"]) == (stage, "d2", 6)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert list(losses(stage, "d2")) == [1, 2, 3, 4, 5, 6]
    record = json.loads((base / "runs" / stage / "d2" / "run.json").read_text())
    assert record["stage"] == stage and record["dataset"] == "corpus"
    scores = [line["val_bpb"] for line in metrics(stage, "d2") if "val_bpb" in line]
    assert record["val_bpb"] == meta["val_bpb"] == scores[-1]
    assert all(0 < score < 2 * math.log2(600) for score in scores)
    assert "step 6: val_bpb" in out[stage]


def test_a_stage_begins_where_the_one_before_ended(finished):
    """With learning rates of next to nothing, midtraining hands on the base model as it was."""
    base, out = finished
    assert "mid from base/d2 step 6" in out["mid"] and "sft from mid/d2 step 6" in out["sft"]
    run("scripts.mid_train", *SKILLS, *STEPS, "--num-iterations", "6", "--init-lr-frac", "0", "--model-tag", "same")
    before = load_file(base / "checkpoints/base/d2/step_000006/model.safetensors")
    after = load_file(base / "checkpoints/mid/same/step_000006/model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    trained = load_file(base / "checkpoints/mid/d2/step_000006/model.safetensors")
    assert not any(before[f"blocks.{i}.mlp.up.weight"].equal(trained[f"blocks.{i}.mlp.up.weight"]) for i in (0, 1))
    # The loss of single steps may rise, because rows differ in how much of them is text and how much conversation. But
    # at no step does the model predict its rows worse than the one that has learned nothing.
    learned = losses("mid", "d2")
    assert all(learned[step] < loss + 1e-3 for step, loss in losses("mid", "same").items())
    assert learned[6] < losses("mid", "same")[6] - 0.01


def test_an_earlier_source_can_be_named(finished):
    flags = [*SKILLS, *STEPS, "--num-iterations", "1", "--model-tag", "early", "--source-tag", "d2"]
    assert "from base/d2 step 3" in run("scripts.mid_train", *flags, "--source-step", "3").out


def test_steps_follow_from_the_conversations(finished):
    """Without --num-iterations: as many whole steps as there are rows, times the epochs."""
    steps = {}
    for epochs in ("1", "3"):
        run("scripts.chat_sft", *SKILLS, *STEPS, "--num-epochs", epochs, "--model-tag", f"e{epochs}")
        lines = [line for line in metrics("sft", f"e{epochs}") if "loss" in line]
        steps[epochs] = len(lines)
        assert lines[-1]["epoch"] == int(epochs) - 1
    assert steps["1"] > 3
    assert 3 * steps["1"] <= steps["3"] < 3 * (steps["1"] + 1)


def test_the_evaluations_run_on_every_stage(finished):
    base, _ = finished
    small = ["--eval-tokens", "512", "--max-per-task", "2"]
    out = run("scripts.base_eval", *small).out
    record = json.loads((base / "evals" / "base_eval_base_d2.json").read_text())
    assert (record["stage"], record["tag"], record["step"]) == ("base", "d2", 6)
    assert record["val_bpb"] > 0 and record["samples"]
    assert record["val_perplexity"] == pytest.approx(math.exp(record["val_loss"]))
    for name in ("val_bpb", "val_loss"):
        assert f"{record[name]:.4f}" in out
    for stage in ("mid", "sft"):
        run("scripts.chat_eval", "--stage", stage, "--model-tag", "d2", "--max-problems", "2", "--max-new-tokens", "8")
        record = json.loads((base / "evals" / f"chat_eval_{stage}_d2.json").read_text())
        assert record["stage"] == stage and set(record["tasks"]) >= {"arithmetic", "world"}
        assert all(0 <= task["accuracy"] <= 1 and task["n"] == 2 for task in record["tasks"].values())
    assert check_records(base) == {
        "runs/STAGE/TAG/metrics.jsonl: a training step",
        "runs/STAGE/TAG/metrics.jsonl: an evaluation",
        "runs/STAGE/TAG/run.json",
        "checkpoints/STAGE/TAG/step_N/meta.json",
        "evals/base_eval_STAGE_TAG.json",
        "evals/chat_eval_STAGE_TAG.json",
        "datasets/NAME/manifest.json",
        "datasets/NAME/rows_TOKENIZER_T/SHARD/meta.json",
    }


def test_the_report_tells_of_every_stage(finished):
    base, _ = finished
    run("scripts.report")
    text = (base / "report" / "report.md").read_text()
    assert "d2" in text and "corpus" in text


def test_the_chat_answers(finished):
    """A model this small says nothing sensible, but it says something and ends."""
    assert run("scripts.chat_cli", "-p", "What is 2+2?").code == 0


def test_skills_take_up_where_they_are_trained(module_world):
    """On the skills alone the loss of midtraining falls well below that of a model that knows only text."""
    first = ["--num-iterations", "60", "--matrix-lr", "0.3", "--embedding-lr", "6", "--model-tag", "taught"]
    run("scripts.mid_train", *SKILLS, *STEPS, *first)
    loss = list(losses("mid", "taught").values())
    assert sum(loss[-5:]) < 0.8 * sum(loss[:5])


def test_a_model_with_shared_kv_heads_goes_all_the_way(module_world, tmp_path, monkeypatch):
    """Trained, resumed, fine-tuned, in the engine, and exported: transformers finds the same logits."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    flags = [*BASE, *STEPS, "--num-iterations", "6", "--save-every", "3", "--n-kv-head", "1", "--model-tag"]
    run("scripts.base_train", *flags, "gqa")
    expected = losses("base", "gqa")
    run("scripts.base_train", *flags, "gqa", "--resume", "3")
    assert losses("base", "gqa") == expected
    run("scripts.mid_train", *SKILLS, *STEPS, "--num-iterations", "1", "--source-tag", "gqa")

    model, tokenizer, meta = checkpoint.load_model("mid", "cpu", "gqa")
    assert (meta["model_config"]["n_head"], meta["model_config"]["n_kv_head"]) == (2, 1)
    ids = tokenizer.encode("The capital of", prepend="<|bos|>")
    [answer] = Engine(model, tokenizer).complete([ids], max_tokens=8)
    for token in answer:
        assert model(torch.tensor([ids]))[0, -1].argmax() == token
        ids.append(token)

    transformers = pytest.importorskip("transformers")
    export_checkpoint(tmp_path / "bundle", "mid", "gqa")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bundle", trust_remote_code=True)
    idx_BT = torch.tensor([ids])
    torch.testing.assert_close(theirs.float()(idx_BT).logits, model(idx_BT), rtol=1e-4, atol=1e-4)
