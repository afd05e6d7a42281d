"""`scripts.base_eval` from the command line: which bundle, which model, what it writes, and what users get wrong."""

import json
import zipfile

import pytest
from core_bundle import CHOICE, CLOZE, SCHEMA, Foreign, oracle_core, random_gpt2, write_bundle
from hub_server import HubServer
from tiny_run import run, run_ranks, script

from nanochat.compute import Compute
from scripts import base_eval

SMALL = ["--eval-tokens", "512"]
TASKS = {
    "choice": ("multiple_choice", 1, 50, [CHOICE, {**CHOICE, "gold": 1}, "torn"]),
    "schema": ("schema", 0, 50, [SCHEMA] * 5),
    "cloze": ("language_modeling", 0, 0, [CLOZE]),
}


def read_record(base, name="base_eval_base_d2"):
    return json.loads((base / "evals" / f"{name}.json").read_text())


def test_a_folder_a_downloaded_bundle_and_two_ranks_agree(trained_world, tmp_path):
    base, bundle = trained_world, write_bundle(tmp_path / "bundle", TASKS)
    result = run("scripts.base_eval", *SMALL, "--bundle", str(bundle))
    assert "choice: 1 bad rows left out: " in result.out and "choice.jsonl:3: " in result.out
    core = read_record(base)["core"]
    assert core["details"]["choice"]["bad_rows"] == 1 and core["details"]["choice"]["n"] == 2
    run_ranks(2, "scripts.base_eval", *SMALL, "--bundle", str(bundle))
    assert read_record(base)["core"] == core
    with HubServer() as server, zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        for path in bundle.rglob("*"):
            archive.write(path, path.relative_to(tmp_path))
        archive.close()
        server.files["bundle.zip"] = (tmp_path / "bundle.zip").read_bytes()
        for _ in range(2):
            run("scripts.base_eval", *SMALL, "--bundle", server.file_url("bundle.zip"))
            assert read_record(base)["core"] == core
        assert len(server.requests) == 1
    assert read_record(base)["bundle"] == server.file_url("bundle.zip")


def test_users_mistakes_are_one_line(trained_world, tmp_path):
    assert "--bundle must name" in script("scripts.base_eval", *SMALL, "--bundle", str(tmp_path)).error_line
    bundle = write_bundle(tmp_path / "b", TASKS)
    (bundle / "core.yaml").write_text("icl_tasks: [")
    assert "do not fit" in script("scripts.base_eval", *SMALL, "--bundle", str(bundle)).error_line
    with HubServer() as server:
        assert "404" in script("scripts.base_eval", *SMALL, "--bundle", server.file_url("none.zip")).error_line
    assert "--max-per-task 0" in script("scripts.base_eval", "--max-per-task", "0").error_line


@pytest.mark.parametrize("name", ["core", "world", "http://hub/b.zip", "some/folder"])
def test_where_a_bundle_comes_from(name, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    asked = []
    monkeypatch.setattr(base_eval, "download_bundle", lambda folder, url: asked.append((folder, url)))
    monkeypatch.setattr(base_eval, "core_bundle", lambda folder: asked.append((folder, None)))
    folder = base_eval.find_bundle(name, Compute.create("cpu"))
    if name == "some/folder":
        assert (str(folder), asked) == (name, [])
    else:
        url = {"core": base_eval.BUNDLE_URL, "world": None}.get(name, name)
        assert asked == [(folder, url)] and folder.parent == tmp_path
        assert folder.name.startswith("eval_bundle") and (name != "core" or folder.name == "eval_bundle")


def test_open_weights_are_scored_by_the_same_code(module_trained, tmp_path):
    """GPT-2 as transformers saves it, read by nanochat.hf, against transformers' own forward, one example at a time."""
    hf, transformers = pytest.importorskip("nanochat.hf"), pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    whole = {label: (*rest, [row for row in rows if row != "torn"]) for label, (*rest, rows) in TASKS.items()}
    bundle, folder = write_bundle(tmp_path / "bundle", whole), tmp_path / "gpt2"
    theirs = random_gpt2(265, 48)
    theirs.save_pretrained(folder)
    vocabulary = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    words = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    words.add_special_tokens(["<|endoftext|>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<|endoftext|>").save_pretrained(folder)
    out = run("scripts.base_eval", "--hf", str(folder), "--bundle", str(bundle), NANOCHAT_DTYPE="float32").out
    assert out.startswith("hf gpt2\n")
    record = read_record(module_trained, "base_eval_hf_gpt2")
    assert (record["stage"], record["tag"], record["step"], record["samples"]) == ("hf", "gpt2", None, [])
    assert record["train_bpb"] is None and record["val_bpb"] is None
    expected = oracle_core(Foreign(theirs, 48), hf.load(folder, "cpu")[1], bundle, max_per_task=100)
    outcomes = {label: details["outcomes"] for label, details in record["core"]["details"].items()}
    assert outcomes == {label: outcomes for label, (outcomes, _) in expected.items()}
