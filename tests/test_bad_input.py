"""A user's mistake ends with status 2 and one line on stderr that names what is wrong; bad documents are skipped."""

import json
import re
import shutil

import pyarrow as pa
import pytest
from pyarrow import parquet
from tiny_run import BASE, SKILLS, STEPS, call, losses, run, script

from nanochat import checkpoint, dataset
from nanochat.documents import iterate_documents, list_shards
from nanochat.tokenizer import Tokenizer

TRAIN = ["scripts.base_train", *BASE, *STEPS, "--num-iterations", "2", "--eval-every", "0"]
MID = ["scripts.mid_train", *SKILLS, *STEPS, "--num-iterations", "2", "--eval-every", "0"]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """What a script called in this process sets for it, such as threads and precision, stays as other tests have it."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def shared(module_trained):
    """A world for mistakes that change nothing."""
    return module_trained


WRONG_FLAGS = [
    (["--depth", "0"], "--depth"),
    (["--depth", "-3"], "--depth"),
    (["--depth", "two"], "--depth"),
    (["--aspect-ratio", "0"], "--aspect-ratio"),
    (["--head-dim", "15"], "--head-dim"),
    (["--head-dim", "0"], "--head-dim"),
    (["--depth", "1", "--aspect-ratio", "8", "--head-dim", "8"], "--aspect-ratio"),
    (["--max-seq-len", "0"], "--max-seq-len"),
    (["--max-seq-len", "-64"], "--max-seq-len"),
    (["--window-pattern", "SXL"], "--window-pattern"),
    (["--window-pattern", ""], "--window-pattern"),
    (["--dropout", "1"], "dropout"),
    (["--dropout", "nan"], "dropout"),
    (["--num-iterations", "0"], "--num-iterations"),
    (["--num-iterations", "1.5"], "--num-iterations"),
    (["--total-batch-size", "500"], "--total-batch-size"),
    (["--total-batch-size", "32"], "--total-batch-size"),
    (["--total-batch-size", "-512"], "--total-batch-size"),
    (["--device-batch-size", "3"], "--device-batch-size"),
    (["--device-batch-size", "16"], "--device-batch-size"),
    (["--device-batch-size", "0"], "--device-batch-size"),
    (["--seed", "-1"], "--seed"),
    (["--seed", str(2**70)], "--seed"),
    (["--matrix-lr", "-1"], "--matrix-lr"),
    (["--embedding-lr", "nan"], "--embedding-lr"),
    (["--weight-decay", "-0.1"], "--weight-decay"),
    (["--grad-clip", "0"], "--grad-clip"),
    (["--schedule", "square"], "--schedule"),
    (["--warmup-steps", "-1"], "--warmup-steps"),
    (["--warmdown-ratio", "1.5"], "--warmdown-ratio"),
    (["--final-lr-frac", "-0.1"], "--final-lr-frac"),
    (["--eval-tokens", "0"], "--eval-tokens"),
    (["--eval-every", "-1"], "--eval-every"),
    (["--save-every", "0"], "--save-every"),
    (["--keep", "0"], "--keep"),
    (["--resume", "yes"], "--resume"),
    (["--device-type", "tpu"], "--device-type"),
    (["--model-tag", "../elsewhere"], "--model-tag"),
    (["--model-tag", "a~1"], "--model-tag"),
    (["--no-such-flag"], "--no-such-flag"),
    (["--dep", "3"], "--dep"),
    (["more"], "more"),
    (["--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
    (["--dataset", "/no/such/folder"], "/no/such/folder"),
    (["--dataset", "nothing"], "nothing"),
]


@pytest.mark.parametrize(("flags", "named"), WRONG_FLAGS, ids=lambda value: " ".join(value) if value[0] != "-" else "")
def test_wrong_flags_of_base_train(shared, flags, named):
    assert named in call(*TRAIN, *flags).error_line


@pytest.mark.parametrize("flags", [["--target-flops", "0"], ["--target-param-data-ratio", "-1"]])
def test_a_horizon_of_nothing(shared, flags):
    assert flags[0] in call("scripts.base_train", *BASE, "--no-compile", *flags).error_line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--num-epochs", "0"], "--num-epochs"),
        (["--init-lr-frac", "-1"], "--init-lr-frac"),
        (["--replay", "-1"], "--replay"),
        (["--scale", "0"], "--scale"),
        (["--source-tag", "nobody"], "nobody"),
        (["--source-step", "5"], "step_000005: steps there are 4, 8"),
        (["--tasks-dir", "/no/such/tasks"], "/no/such/tasks"),
        (["--depth", "3"], "--depth"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flags_of_finetuning(shared, flags, named):
    for module in ("scripts.mid_train", "scripts.chat_sft"):
        line = call(module, *SKILLS, *STEPS, "--num-iterations", "2", *flags).error_line
        assert named in line or (named in "nobody step_000005: steps there are 4, 8" and "step" in line)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("detph: 3", "--detph"),
        ("depth: three", "--depth"),
        ("depth: [3]", "--depth"),
        ("schedule: square", "--schedule: invalid choice"),
        ("- depth", "must hold 'flag: value' lines"),
        ("depth: {", "is not valid YAML"),
        ("num_iterations: 0", "--num-iterations 0"),
    ],
)
def test_wrong_config_files(shared, tmp_path, text, named):
    (tmp_path / "my.yaml").write_text(text)
    line = call("scripts.base_train", *STEPS, "--config", str(tmp_path / "my.yaml")).error_line
    assert named in line
    assert "my.yaml" in line or "--num-iterations" in line


def test_a_wrong_dtype(shared, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float8")
    assert "NANOCHAT_DTYPE=float8" in call(*TRAIN).error_line


def test_training_in_float16(shared, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    for command in (TRAIN, MID):
        assert "float16 is for inference only: train in bfloat16 or float32" in call(*command).error_line


def test_resuming_what_is_not_there(shared):
    assert "start without --resume" in call(*TRAIN, "--model-tag", "none", "--resume").error_line
    assert "steps there are none" in call(*TRAIN, "--model-tag", "none", "--resume", "3").error_line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--depth", "3"], "model_config"),
        (["--total-batch-size", "1024"], "total_batch_size"),
        (["--num-iterations", "9"], "num_iterations"),
    ],
)
def test_resuming_with_other_flags(shared, flags, named):
    line = call(*TRAIN, "--num-iterations", "8", "--model-tag", "d2", "--resume", *flags).error_line
    assert "--resume" in line and named in line
    assert checkpoint.list_steps("base", "d2") == [4, 8], "and nothing was moved"


def test_resuming_on_another_text(trained_world, tmp_path):
    """The same name and the same tokenizer are not enough: a changed document is another run."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    shutil.rmtree(list_shards("corpus", "train")[0].parent)
    dataset.prepare(str(folder))
    line = call(*TRAIN, "--num-iterations", "8", "--model-tag", "d2", "--resume").error_line
    assert "--resume" in line and "data_hash" in line


def test_wandb_that_cannot_be_reached(shared, tmp_path):
    """No key, no terminal to ask for one on: a line, not a traceback, and not a hanging run."""
    pytest.importorskip("wandb")
    nowhere = {"HOME": str(tmp_path), "WANDB_MODE": "online", "WANDB_API_KEY": "", "NETRC": str(tmp_path / "netrc")}
    result = script(*TRAIN, "--model-tag", "w", "--run", "trial", **nowhere)
    assert result.code == 2, result
    assert "Traceback" not in result.err
    assert re.search(r"^error: --run trial.*WANDB_MODE=offline", result.err, re.M), result.err


# --- what is missing or damaged


def test_a_missing_tokenizer(trained_world):
    shutil.rmtree(trained_world / "tokenizer")
    for command in (TRAIN, MID, ["scripts.base_eval"], ["scripts.chat_eval", "--stage", "mid"]):
        assert "python -m scripts.tok_train" in call(*command).error_line


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": "other"}'])
def test_a_damaged_tokenizer(tiny_world, content):
    (tiny_world / "tokenizer" / "tokenizer.json").write_text(content)
    assert "tokenizer.json" in call(*TRAIN).error_line


def test_another_tokenizer_than_the_checkpoints(trained_world):
    (trained_world / "tokenizer" / "tokenizer.json").unlink()
    Tokenizer.train_from_iterator(["some other text"] * 9, 280).save(trained_world / "tokenizer")
    for command in (MID, ["scripts.base_eval"], ["scripts.chat_eval", "--stage", "mid"]):
        line = call(*command).error_line
        assert "was trained with tokenizer" in line and "back as tokenizer.json" in line
    line = call(*TRAIN, "--num-iterations", "8", "--resume").error_line
    assert "tokenizer" in line or "model_config" in line


def test_a_missing_stage(tiny_world):
    for command, remedy in (
        (MID, "scripts.base_train"),
        (["scripts.chat_sft", *STEPS, *SKILLS], "scripts.mid_train"),
        (["scripts.base_eval"], "scripts.base_train"),
        (["scripts.chat_eval"], "scripts.chat_sft"),
    ):
        assert f"run python -m {remedy} first" in call(*command).error_line


@pytest.mark.parametrize("name", ["model.safetensors", "optim.000.safetensors", "meta.json"])
def test_a_truncated_checkpoint(trained_world, name):
    """Named when asked for; the one before is taken when not; an error when there is no other."""
    folder = trained_world / "checkpoints" / "base" / "d2"
    path = folder / "step_000008" / name
    path.write_bytes(path.read_bytes()[:-50])
    line = call(*MID, "--source-step", "8").error_line
    assert str(path) in line
    assert "from base/d2 step 4" in run(*MID, "--model-tag", "new").out
    assert "resumed base/d2 at step 4" in run(*TRAIN, "--num-iterations", "8", "--resume").out
    for left in folder.glob("step_*/meta.json"):
        left.write_text("")
    assert "no whole checkpoint" in call(*MID).error_line


def test_no_dataset_and_no_shard(tiny_world):
    train = list_shards("corpus", "train")
    train[0].unlink()
    assert "shard_00000.parquet" in call(*TRAIN).error_line
    (train[0].parent / "manifest.json").unlink()
    assert "python -m nanochat.dataset --name corpus" in call(*TRAIN).error_line


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shard_that_is_damaged(tiny_world, split):
    path = list_shards("corpus", split)[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert path.name in call(*TRAIN).error_line


@pytest.mark.parametrize("name", ["rows.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["short", "garbage"])
def test_rows_that_are_damaged(tiny_world, name, damage):
    run(*TRAIN)
    folder = next(path for path in list_shards("corpus", "train")[0].parent.glob("rows_*/shard_00000*"))
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-9] if damage == "short" else b"\xff" * len(data))
    line = call(*TRAIN).error_line
    assert str(folder) in line and "delete" in line


@pytest.mark.parametrize("files", [[], ["notes.md"], [".hidden.txt"]])
def test_an_empty_folder(tiny_world, tmp_path, files):
    (tmp_path / "empty").mkdir()
    for file in files:
        (tmp_path / "empty" / file).write_text("text")
    line = call("nanochat.dataset", "--name", str(tmp_path / "empty")).error_line
    assert str(tmp_path / "empty") in line and "put your text there" in line
    assert "not prepared" in call(*TRAIN, "--dataset", str(tmp_path / "empty")).error_line


def test_a_folder_of_empty_documents(tiny_world, tmp_path):
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.jsonl").write_text('{"text": ""}\n{"text": " \\u0000 "}\n')
    assert str(tmp_path / "blank") in call("nanochat.dataset", "--name", str(tmp_path / "blank")).error_line


@pytest.mark.parametrize("size", ["0", "-5", "264"])
def test_a_vocabulary_smaller_than_bytes_and_specials(shared, size):
    line = call("scripts.tok_train", "--dataset", "corpus", "--vocab-size", size).error_line
    assert "vocab" in line and "265" in line


# --- single documents and conversations are skipped and counted


def test_documents_with_lone_surrogates_and_nuls(tiny_world, tmp_path):
    texts = [f"Document {i} is like any other, and tells of {i} things in a row." for i in range(40)]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[3:3] = ['{"text": "half \\ud83d a pair"}', '{"text": "a\\u0000NUL"}', '{"text": ""}', '{"text": "\\u0000"}']
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "a.jsonl").write_text("\n".join(lines))
    out = run("nanochat.dataset", "--name", str(tmp_path / "odd")).out
    assert "skipped: 2, cleaned: 2" in out
    documents = list(iterate_documents([*list_shards("odd", "train"), *list_shards("odd", "val")]))
    assert sorted(documents) == sorted([*texts, "half \ufffd a pair", "aNUL"])
    run(*TRAIN, "--dataset", "odd")
    assert list(losses("base", "d2")) == [1, 2]


def test_malformed_conversations_are_skipped_and_counted(trained_world, tmp_path):
    def turns(*pairs):
        return [{"role": role, "content": content} for role, content in pairs]

    good = turns(("user", "Hello there"), ("assistant", "Hello!"))
    bad = [
        turns(("assistant", "I speak first"), ("user", "No")),
        turns(("user", "one"), ("user", "two")),
        turns(("user", "asked"), ("assistant", "")),
        turns(("user", ""), ("assistant", "answered")),
        turns(("narrator", "Once"), ("assistant", "upon")),
        turns(("system", "only a system message")),
        [],
    ]
    (tmp_path / "tasks" / "smoltalk").mkdir(parents=True)
    kind = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    for split in ("train", "test"):
        table = pa.table({"messages": pa.array([*bad, good, good, good], kind)})
        parquet.write_table(table, tmp_path / "tasks" / "smoltalk" / f"{split}.parquet")
    out = run(*MID, "--tasks-dir", str(tmp_path / "tasks")).out
    assert re.search(rf"train\.parquet: skipped {len(bad)} of {len(bad) + 3} conversations", out), out
    assert re.search(rf"test\.parquet: skipped {len(bad)} of {len(bad) + 3} conversations", out), out
    unused = turns(("user", "word " * 300), ("assistant", "too late to be seen"))
    table = pa.table({"messages": pa.array([unused, unused, good], kind)})
    parquet.write_table(table, tmp_path / "tasks" / "smoltalk" / "train.parquet")
    plain, more = (run(*MID, *extra).out for extra in ([], ["--tasks-dir", str(tmp_path / "tasks")]))
    counts = [int(re.search(r"skipped (\d+) of", text)[1]) if "skipped" in text else 0 for text in (plain, more)]
    assert more.count("skipped") >= plain.count("skipped")
    assert counts[1] >= 2


def test_a_damaged_parquet_of_conversations(shared, tmp_path):
    (tmp_path / "smoltalk").mkdir()
    (tmp_path / "smoltalk" / "train.parquet").write_bytes(b"PAR1 nothing")
    assert "train.parquet" in call(*MID, "--tasks-dir", str(tmp_path)).error_line
