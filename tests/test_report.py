"""The report from records made up here: its numbers, its bytes, its figures, and what it says of damaged records."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import record_fields
from nanochat.records import Records
from nanochat.report import model_card, show_tool_calls, write_report

ROOT = Path(__file__).resolve().parent.parent
PROVENANCE = {
    "commit": "abc123def456",
    "hardware": {"processor": "Test CPU", "cores": 2},
    "versions": {"python": "3.12.1", "torch": "2.13.0"},
}
TOOL_ANSWER = "<|python_start|>37*48<|python_end|><|output_start|>1776<|output_end|>37*48 = 1776."


def test_the_page_of_records_is_what_the_code_says():
    """Other tests hold the code to real records: those that call `check_records`."""
    page = (ROOT / "dev" / "records.md").read_text(encoding="utf-8")
    assert page == record_fields.page() + "\n", "python -m nanochat.record_fields > dev/records.md"


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def score(accuracy, n=200, baseline=0.0):
    return {
        "accuracy": accuracy,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / n),
        "n": n,
        "baseline": baseline,
        "centered": (accuracy - baseline) / (1 - baseline),
    }


def write_run(base, stage, steps, date):
    rng = random.Random(stage)
    lines = []
    for step in range(steps):
        loss = 2 + 6 * math.exp(-step / 20) + rng.gauss(0, 0.1)
        lines.append(
            {"step": step, "loss": loss, "tokens": 8192 * (step + 1), "tok_per_sec": 12_000 + rng.gauss(0, 500)}
        )
        lines[-1] |= {"mfu": None, "dt": 0.7, "peak_mem_bytes": 3 << 30, "lr_mult": 1.0, "epoch": 0}
        if step % 25 == 24:
            lines.append({"step": step, "val_bpb": 3.5 - step / 100, "val_loss": 8.5 - step / 100})
    folder = base / "runs" / stage / "d4"
    config = {"depth": 4, "device_batch_size": 16, "run": None}
    model = {"sequence_len": 512, "n_layer": 4, "window_pattern": "L"}
    run = {
        "stage": stage,
        "tag": "d4",
        "config": config,
        "model_config": model,
        "parameters": 5_000_000,
        "wall_seconds": 312.0,
        "steady_seconds": 305.0,
    }
    write_json(folder / "run.json", {**run, "date": date, **PROVENANCE})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def base(tmp_path):
    """A base directory after three stages."""
    base = tmp_path / "base"
    tasks = {
        "base": {"arithmetic": score(0.0), "choice": score(0.25, baseline=0.25)},
        "mid": {"arithmetic": score(0.9), "choice": score(0.5, baseline=0.25)},
        "sft": {"arithmetic": score(0.975), "choice": score(0.65, baseline=0.25), "identity": score(0.95)},
    }
    for i, (stage, scores) in enumerate(tasks.items()):
        date = f"2026-11-2{i}T10:00:00Z"
        write_run(base, stage, 120, date)
        chatcore = sum(s["centered"] for s in scores.values()) / len(scores)
        sample = {"task": "arithmetic", "question": "What is 37*48?", "answer": TOOL_ANSWER, "correct": True}
        odd = {"task": "choice", "question": "A ``` fence | a bar", "answer": stage, "correct": False}
        chat = {
            "stage": stage,
            "tag": "d4",
            "step": 120,
            "chatcore": chatcore,
            "chatcore_stderr": 0.01,
            "tasks": scores,
            "samples": [sample, odd],
        }
        write_json(base / "evals" / f"chat_eval_{stage}_d4.json", {**chat, "date": date, **PROVENANCE})
    core = {"core_metric": 0.1234, "core_stderr": 0.02, "skipped": {"gone": "no file"}}
    core |= {"details": {"world_cloze": score(0.4, n=100), "world_schema": score(0.6, n=100, baseline=0.5)}}
    samples = [{"prompt": "The capital of France is", "text": " Paris."}]
    evaluation = {"stage": "base", "tag": "d4", "step": 120, "train_bpb": 1.2345, "val_bpb": 1.3456, "bundle": "world"}
    evaluation |= {"val_loss": 2.9876, "val_perplexity": 19.8381}
    write_json(
        base / "evals" / "base_eval_base_d4.json", {**evaluation, "core": core, "samples": samples, **PROVENANCE}
    )
    texts = {"English": {"bytes": 1000, "ours": {"tokens": 250, "bytes_per_token": 4.0, "ratio": 1.0}}}
    write_json(base / "evals" / "tok_eval.json", {"vocab_sizes": {"ours": 4096}, "texts": texts, **PROVENANCE})
    times = [
        {"stage": "tok_train", "tag": "d4", "seconds": 999.0},  # made again, after another run
        {"stage": "tok_train", "tag": "d2-smoke", "seconds": 7.0},
        {"stage": "tok_train", "tag": "d4", "seconds": 45.0},
        {"stage": "base_train", "tag": "d4", "seconds": 3555.0},
    ]
    (base / "runs" / "stages.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times))
    shards = [{"file": "a", "bytes": 1_500_000, "documents": 800}, {"file": "b", "bytes": 500_000, "documents": None}]
    manifest = {"name": "own", "source": "/some/folder", "licence": "CC-BY-NC-4.0", "shards": shards}
    write_json(base / "datasets" / "own" / "manifest.json", manifest)
    return base


def row(text, first):
    """The cells of the table row that begins with `first`."""
    found = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    assert len(found) == 1, (first, found)
    return [cell.strip() for cell in found[0].strip("|").split(" | ")]


def test_the_numbers_of_the_records_are_in_the_report(base):
    text = write_report(base, base / "report", price=24.0).read_text()
    assert row(text, "arithmetic")[1:] == ["200", "0", "0.0 ± 0.0", "90.0 ± 2.1 (+90.0)", "97.5 ± 1.1 (+7.5)"]
    assert row(text, "choice")[1:] == ["200", "25", "25.0 ± 3.1", "50.0 ± 3.5 (+25.0)", "65.0 ± 3.4 (+15.0)"]
    assert row(text, "identity")[3:] == ["–", "–", "95.0 ± 1.5"]
    assert row(text, "**ChatCORE**")[3:] == ["0.000 ± 0.010", "0.617 ± 0.010 (+0.617)", "0.819 ± 0.010 (+0.203)"]
    assert ["base", "1.2345", "1.3456", "2.9876", "19.838", "0.1234 ± 0.0200", "world", "gone"] in [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()
    ]
    assert row(text, "world_cloze")[1:] == ["100", "0", "40.0 ± 4.9"]
    assert row(text, "English")[1:] == ["1,000", "4"]
    assert row(text, "own") == ["own", "/some/folder", "CC-BY-NC-4.0", "2", "–", "2.0 MB"]
    assert row(text, "tok_train")[1:] == ["0:00:45", "1 %", "$ 0.30"]
    assert row(text, "**total**")[1:] == ["1:00:00", "100 %", "$ 24.00"]
    losses = [json.loads(line).get("loss") for line in (base / "runs/mid/d4/metrics.jsonl").read_text().splitlines()]
    last = [loss for loss in losses if loss is not None][-1]
    expected = ["–", "5,000,000", "119", "983,040", f"{last:.5g}", "2.51", "7.51"]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if "5,000,000" in line]
    assert [c[0] for c in cells] == ["base", "mid", "sft"] and cells[1][1:8] == expected
    assert cells[1][10:] == ["–", "3.0 GiB", "0:05:12", "0:05:05"]
    assert row(text, "depth")[1:] == ["4", "4", "4"]
    assert row(text, "n_layer")[1:] == ["4", "4", "4"]
    assert "| run |" not in text  # unset everywhere
    assert "abc123def456" in text and "Test CPU" in text and "2026-11-20T10:00:00Z to 2026-11-22T10:00:00Z" in text
    assert "The capital of France is» Paris." in text
    assert "[calculator: 37*48 → 1776] 37*48 = 1776." in text and "<|python_start|>" not in text
    assert "not run" not in text


def test_a_rerun_gives_the_same_bytes(base, tmp_path):
    first = write_report(base, base / "report")
    second = write_report(base, tmp_path / "again")
    names = sorted(path.name for path in first.parent.iterdir())
    assert names == sorted(
        ["report.md", "MODEL_CARD_d4.md", *(f"{name}_d4.png" for name in ("loss", "bpb", "speed", "tasks"))]
    )
    assert all((first.parent / name).read_bytes() == (second.parent / name).read_bytes() for name in names)


def test_every_figure_is_a_png_that_the_report_shows(base):
    from matplotlib.image import imread

    report = write_report(base, base / "report")
    for path in report.parent.glob("*.png"):
        assert f"({path.name})" in report.read_text()
        image_HWC = imread(path)
        assert min(image_HWC.shape[:2]) > 200 and image_HWC.std() > 0.01


def test_stages_that_did_not_run_are_said_so(tmp_path):
    assert write_report(tmp_path, tmp_path / "report").read_text().count("not run") == 5
    write_run(tmp_path, "base", 3, "2026-11-20T10:00:00Z")
    text = write_report(tmp_path, tmp_path / "report").read_text()
    assert (
        "## Model d4" in text and "### Validation\n\nnot run" in text and "### Chat tasks by stage\n\nnot run" in text
    )


def test_several_models_have_a_section_each(base):
    record = json.loads((base / "evals" / "chat_eval_sft_d4.json").read_text())
    write_json(base / "evals" / "chat_eval_sft_d6.json", {**record, "tag": "d6"})
    text = write_report(base, base / "report").read_text()
    assert text.index("## Model d4") < text.index("## Model d6")
    assert (base / "report" / "tasks_d6.png").is_file()


def test_a_model_card_tells_of_its_stage_and_those_before(base):
    import yaml

    card = model_card(Records.read(base), "d4", "mid")
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["pipeline_tag"] == "text-generation"
    assert row(body, "arithmetic")[1:] == ["200", "0", "0.0 ± 0.0", "90.0 ± 2.1 (+90.0)"]  # and not what SFT reaches
    assert "5,000,000 parameters" in body and "abc123def456" in body and "2026-11-22" not in body
    write_report(base, base / "report")
    assert "97.5 ± 1.1" in (base / "report" / "MODEL_CARD_d4.md").read_text()
    with pytest.raises(ValueError, match="no run rl/d4"):
        model_card(Records.read(base), "d4", "rl")


def test_a_model_card_lists_the_data_of_its_runs_alone(base):
    run = base / "runs" / "base" / "d4" / "run.json"
    write_json(run, {**json.loads(run.read_text()), "dataset": "own"})
    shards = [{"bytes": 1, "documents": 1}]
    write_json(base / "datasets/x/manifest.json", {"name": "x", "source": "s", "licence": "secret", "shards": shards})
    card = model_card(Records.read(base), "d4", "base")
    assert "CC-BY-NC-4.0" in card and "secret" not in card


def test_open_weights_models_have_a_table_of_their_own(base):
    record = json.loads((base / "evals" / "base_eval_base_d4.json").read_text())
    foreign = {**record, "stage": "hf", "tag": "gpt2", "train_bpb": None, "val_bpb": None, "bundle": "core"}
    del foreign["val_loss"], foreign["val_perplexity"]  # as in records of older versions
    write_json(base / "evals" / "base_eval_hf_gpt2.json", foreign)
    text = write_report(base, base / "report").read_text()
    assert "## Model gpt2" not in text
    assert row(text, "gpt2") == ["gpt2", "–", "–", "–", "–", "0.1234 ± 0.0200", "core", "gone"]


def test_runs_that_were_set_aside_do_not_count(base):
    before = write_report(base, base / "report").read_bytes()
    old = base / "runs" / "base" / "d4~1"
    old.mkdir()
    record = json.loads((base / "runs" / "base" / "d4" / "run.json").read_text())
    write_json(old / "run.json", {**record, "parameters": 1})
    assert write_report(base, base / "report").read_bytes() == before


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("evals/chat_eval_sft_d4.json", '{"stage": "sft", "ta'),
        ("evals/chat_eval_sft_d4.json", '{"stage": "sft", "tag": "d4"}'),
        ("evals/base_eval_base_d4.json", "[]"),
        ("evals/tok_eval.json", "\x00\x01"),
        ("runs/base/d4/run.json", "{}"),
        ("runs/base/d4/metrics.jsonl", '{"step": 1, "loss": 3.0}\n{"step": 2, "lo'),
        ("runs/stages.jsonl", '{"stage": "base_train"}\n'),
    ],
)
def test_a_damaged_record_is_one_line_that_names_its_file(base, file, content):
    (base / file).write_text(content)
    with pytest.raises(ValueError, match=Path(file).name) as caught:
        write_report(base, base / "report")
    assert "\n" not in str(caught.value) and not (base / "report" / "report.md").exists()


@pytest.mark.parametrize(
    ("file", "change", "place"),
    [
        ("evals/base_eval_base_d4.json", {"core": None}, "core"),
        ("evals/base_eval_base_d4.json", {"core": {"core_metric": None}}, "core.core_stderr"),
        ("evals/base_eval_base_d4.json", {"val_bpb": "1.3"}, "val_bpb"),
        ("evals/base_eval_base_d4.json", {"samples": [{"prompt": "x"}]}, "samples.0.text"),
        ("evals/chat_eval_sft_d4.json", {"tasks": {"choice": {}}}, "tasks.choice.accuracy"),
        ("evals/chat_eval_sft_d4.json", {"tasks": []}, "tasks"),
        ("evals/chat_eval_sft_d4.json", {"samples": [{}]}, "samples.0.task"),
        ("evals/chat_eval_sft_d4.json", {"date": 5}, "date"),
        ("evals/tok_eval.json", {"texts": {"English": {"bytes": 9, "ours": {}}}}, "texts.English.ours.bytes_per_token"),
        ("evals/tok_eval.json", {"vocab_sizes": None}, "vocab_sizes"),
        ("runs/base/d4/run.json", {"model_config": None}, "model_config"),
        ("runs/base/d4/run.json", {"wall_seconds": None}, "wall_seconds"),
        ("runs/base/d4/run.json", {"dataset": []}, "dataset"),
        ("datasets/own/manifest.json", {"shards": [{}]}, "shards.0.bytes"),
    ],
)
def test_a_record_that_is_damaged_inside_is_one_line_that_names_file_and_place(base, file, change, place):
    record = json.loads((base / file).read_text())
    write_json(base / file, {**record, **change})
    with pytest.raises(ValueError, match=rf"{Path(file).name} is damaged at {place} \(.*\): delete it") as caught:
        write_report(base, base / "report")
    assert "\n" not in str(caught.value)


def test_tool_calls_are_shown():
    assert show_tool_calls(TOOL_ANSWER) == "[calculator: 37*48 → 1776] 37*48 = 1776."
    assert show_tool_calls("a<|python_start|>1/0<|python_end|>b") == "a[calculator: 1/0] b"


def test_the_command_prints_the_path_or_one_line(base):
    def run(*arguments):
        environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base)}
        command = [sys.executable, "-m", "scripts.report", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)

    good = run("--out", str(base / "elsewhere"))
    assert good.returncode == 0 and good.stdout.strip() == str(base / "elsewhere" / "report.md")
    bad = run("--price", "-1")
    assert bad.returncode == 2 and "--price -1" in bad.stderr and len(bad.stderr.strip().splitlines()) == 1
