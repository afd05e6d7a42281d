"""What the training tests share: a tiny world to train in, made once and copied for each test that wants it."""

import json
import shutil
import signal

import pytest
import tiny_run
import torch

from nanochat import dataset, world
from nanochat.tokenizer import Tokenizer

TEXTS = list(world.documents(1, 120_000))


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_arrives():
    """A shell starts what is in the background with SIGINT ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def session_world(tmp_path_factory):
    """A base directory with a dataset "corpus" of two training shards and one of validation, and a tokenizer."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    (folder / "corpus").mkdir()
    for i, name in enumerate(("train-0", "train-1", "val")):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[i::3])
        (folder / "corpus" / f"{name}.jsonl").write_text(lines)
    with tiny_run.base_dir(folder / "base") as base, pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "SHARD_BYTES", 50_000)
        dataset.prepare(str(folder / "corpus"))
        Tokenizer.train_from_iterator(TEXTS, 600).save(base / "tokenizer")
    return base


@pytest.fixture(scope="session")
def session_trained(session_world, tmp_path_factory):
    """The same with checkpoints base/d2 at steps 4 and 8 and mid/d2 at step 4."""
    base = tmp_path_factory.mktemp("trained") / "base"
    shutil.copytree(session_world, base)
    with tiny_run.base_dir(base):
        tiny_run.run(
            "scripts.base_train", *tiny_run.BASE, *tiny_run.STEPS, "--num-iterations", "8", "--eval-every", "4"
        )
        tiny_run.run("scripts.mid_train", *tiny_run.STEPS, *tiny_run.SKILLS, "--num-iterations", "4")
    return base


def _own(source, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(source, base)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    return base


@pytest.fixture(scope="module")
def module_world(session_world, tmp_path_factory):
    """A copy of the world for all tests of a file."""
    base = tmp_path_factory.mktemp("module") / "base"
    shutil.copytree(session_world, base)
    with tiny_run.base_dir(base):
        yield base


@pytest.fixture(scope="module")
def module_trained(session_trained, tmp_path_factory):
    """A copy of the world with its checkpoints for all tests of a file."""
    base = tmp_path_factory.mktemp("module") / "base"
    shutil.copytree(session_trained, base)
    with tiny_run.base_dir(base):
        yield base


@pytest.fixture
def tiny_world(session_world, tmp_path, monkeypatch):
    """A copy of the world of one's own, as NANOCHAT_BASE_DIR."""
    return _own(session_world, tmp_path, monkeypatch)


@pytest.fixture
def trained_world(session_trained, tmp_path, monkeypatch):
    """A copy of the world with its checkpoints."""
    return _own(session_trained, tmp_path, monkeypatch)
