"""The order of rows on any number of ranks; no token lost or doubled, whatever arrives late or damaged."""

import contextlib
import itertools
import json
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from test_dataset import parquet_bytes, write_jsonl

from nanochat import token_shards
from nanochat.dataloader import RowLoader
from nanochat.dataset import prepare
from nanochat.documents import dataset_dir, iterate_documents, list_shards
from nanochat.token_shards import TextRows, pack_masked
from nanochat.tokenizer import Tokenizer

T = 32
TEXTS = [f"Number {i}: " + "the quick brown fox jumps over the lazy dog. " * (i * i % 23) for i in range(240)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(TEXTS, 300)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A dataset of three training shards and one for validation."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", TEXTS[:180])
    write_jsonl(folder / "val.jsonl", TEXTS[180:])
    monkeypatch.setattr("nanochat.dataset.SHARD_BYTES", sum(map(len, TEXTS[:180])) // 3 + 1)
    prepare(str(folder))
    return "corpus"


def set_in_manifest(name, **values):
    path = dataset_dir(name) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def train_rows(name, tokenizer):
    return TextRows(name, "train", tokenizer, T)


def rows_of(batches):
    """Micro-batches as whole rows of T+1, whose two halves must agree; and their targets."""
    inputs, targets = (torch.cat(part) for part in zip(*batches))
    counted = targets != -1
    assert torch.equal(inputs[:, 1:][counted[:, :-1]], targets[:, :-1][counted[:, :-1]]), "targets are shifted by one"
    return torch.cat([inputs, targets[:, -1:]], dim=1), targets


def epoch_rows(rows, seed=0, epoch=0):
    loader = RowLoader(rows, 1, 1, seed)
    first = epoch * loader.rows_in_epoch
    steps = range(first, first + loader.rows_in_epoch)
    assert {loader.epoch(step) for step in steps} == {epoch}
    return torch.cat([rows_of(loader.step(step))[0] for step in steps])


# --- the order of rows


@pytest.mark.parametrize("shuffled", [False, True], ids=["all shards together", "shard by shard"])
def test_every_token_of_the_corpus_once_an_epoch(corpus, tokenizer, shuffled):
    set_in_manifest(corpus, shuffled=shuffled)
    bos = tokenizer.get_bos_token_id()
    texts = tokenizer.encode(list(iterate_documents(list_shards(corpus, "train"))))
    expected = Counter(itertools.chain.from_iterable(texts))
    for epoch in (0, 2):
        rows = epoch_rows(train_rows(corpus, tokenizer), epoch=epoch)
        assert (rows[:, 0] == bos).all()
        assert Counter(rows[(rows != bos) & (rows != -1)].tolist()) == expected


def test_pieces_are_runs_of_documents(corpus, tokenizer):
    """Every text between two BOS occurs in a document, and only the last row of a shard has uncounted targets."""
    documents = "\n".join(iterate_documents(list_shards(corpus, "train")))
    loader = RowLoader(train_rows(corpus, tokenizer), 1, 1, 0)
    gaps = 0
    for step in range(loader.rows_in_epoch):
        rows, targets = rows_of(loader.step(step))
        gaps += bool((targets == -1).any())
        for piece in tokenizer.decode(rows[0][rows[0] >= 0].tolist()).split("<|bos|>"):
            assert piece in documents
    assert gaps <= 3


def test_shards_are_mixed_unless_the_dataset_is_shuffled_already(corpus, tokenizer):
    def first_rows_are_shard_0():
        rows = train_rows(corpus, tokenizer)
        own = rows.open(0).rows_RT1[:, :-1].tolist()
        return sorted(epoch_rows(rows)[: len(own), :-1].tolist()) == sorted(own)

    assert not first_rows_are_shard_0()
    set_in_manifest(corpus, shuffled=True)
    assert first_rows_are_shard_0()


@pytest.mark.parametrize("shuffled", [False, True])
def test_ranks_and_accumulation_see_the_same_rows(corpus, tokenizer, shuffled):
    set_in_manifest(corpus, shuffled=shuffled)
    rows = train_rows(corpus, tokenizer)
    whole = RowLoader(rows, 8, 8, seed=5)
    for step in range(0, 160, 5):
        expected = rows_of(whole.step(step))[0]
        for world_size, device_rows in [(1, 2), (2, 2), (4, 2), (4, 1), (8, 1)]:
            got = torch.empty_like(expected)
            for rank in range(world_size):
                batches = RowLoader(rows, 8, device_rows, 5, rank, world_size).step(step)
                assert [tuple(x.shape) for x, _ in batches] == [(device_rows, T)] * (8 // world_size // device_rows)
                got[rank::world_size] = rows_of(batches)[0]
            assert torch.equal(got, expected)
    assert whole.epoch(155) >= 2, "several epochs were compared"


def test_first_rows_are_the_same_set_on_any_number_of_ranks(corpus, tokenizer):
    rows = train_rows(corpus, tokenizer)

    def counted(batches):
        """The rows whose targets count."""
        return [inputs.tolist() for x, y in batches for inputs, targets in zip(x, y) if (targets >= 0).any()]

    expected = counted(RowLoader(rows, 4, 4, 0).first_rows(11))
    assert len(expected) == 11
    parts = [counted(RowLoader(rows, 4, 2, 0, rank, 2).first_rows(11)) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == sorted(expected)


@pytest.mark.parametrize("count", [1, 3, 9, 13, 16])
def test_every_rank_evaluates_equally_many_batches_of_one_shape(corpus, tokenizer, count):
    rows = train_rows(corpus, tokenizer)
    for world_size, device_rows in [(1, 3), (3, 2), (4, 1)]:
        shapes = []
        for rank in range(world_size):
            loader = RowLoader(rows, 2 * device_rows * world_size, device_rows, 0, rank, world_size)
            shapes.append([tuple(inputs.shape) for inputs, _ in loader.first_rows(count)])
        assert set(shapes[0]) == {(device_rows, T)}
        assert all(others == shapes[0] for others in shapes)


def test_the_reading_thread_uses_the_gpu_of_its_process(corpus, tokenizer, monkeypatch):
    """A thread begins on GPU 0. Here the GPU is a stand-in: what counts is who chose which."""
    chosen = []

    class Event:
        def synchronize(self):
            assert (threading.current_thread(), torch.device("cuda:3")) in chosen, "before the first call to CUDA"

        def record(self):
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((threading.current_thread(), device)))
    monkeypatch.setattr(RowLoader, "_buffer", lambda self, pin: torch.empty(2, 4, T, dtype=torch.int64))
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **options: to(self, "cpu"))
    with contextlib.closing(RowLoader(train_rows(corpus, tokenizer), 4, 4, 0, device="cuda:3").iterate()) as steps:
        next(steps)
        next(steps)
    assert threading.main_thread() not in [thread for thread, _ in chosen]


def test_seed_and_epoch_change_the_order_and_nothing_else(corpus, tokenizer):
    rows = train_rows(corpus, tokenizer)
    one = epoch_rows(rows, seed=0).tolist()
    assert one == epoch_rows(train_rows(corpus, tokenizer), seed=0).tolist()
    for other in (epoch_rows(rows, seed=1).tolist(), epoch_rows(rows, seed=0, epoch=1).tolist()):
        assert other != one
        assert sorted(other) == sorted(one)


def test_resume_is_the_same_run_and_takes_no_time(corpus, tokenizer):
    through = []
    loader = RowLoader(train_rows(corpus, tokenizer), 8, 4, 0)
    for step, batches in itertools.islice(loader.iterate(), 300):
        assert step == len(through)
        through.append(rows_of(batches)[0])
    for start in (1, 123, 299):
        began = time.monotonic()
        loader = RowLoader(train_rows(corpus, tokenizer), 8, 4, 0)
        step, batches = next(loader.iterate(start))
        assert time.monotonic() - began < 1.0
        assert step == start
        assert torch.equal(rows_of(batches)[0], through[start])


def test_fewer_rows_than_a_step_wrap_into_later_epochs(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "tiny").mkdir()
    write_jsonl(tmp_path / "tiny" / "a.jsonl", ["one little text", "another little text"])
    prepare(str(tmp_path / "tiny"))
    loader = RowLoader(train_rows("tiny", tokenizer), 8, 8, 0)
    assert loader.rows_in_epoch == 1
    rows, targets = rows_of(loader.step(3))
    assert rows.shape == (8, T + 1)
    ids = tokenizer.encode(next(iterate_documents(list_shards("tiny", "train"))))
    for row, wanted in zip(rows, targets):
        assert row[1 : len(ids) + 1].tolist() == wanted[: len(ids)].tolist() == ids
        assert (wanted[len(ids) :] == -1).all(), "what fills the last row is no target"
    assert loader.epoch(3) == 24


def test_batches_yielded_earlier_are_not_overwritten(corpus, tokenizer):
    loader = RowLoader(train_rows(corpus, tokenizer), 4, 4, 0)
    kept = [batches for _, batches in itertools.islice(loader.iterate(), 20)]
    for step, batches in enumerate(kept):
        assert torch.equal(rows_of(batches)[0], rows_of(loader.step(step))[0])


def test_close_ends_the_thread(corpus, tokenizer, monkeypatch):
    rows = train_rows(corpus, tokenizer)
    open_shard = rows.open
    monkeypatch.setattr(rows, "open", lambda shard: (time.sleep(0.1), open_shard(shard))[1])
    before = threading.active_count()
    iterator = RowLoader(rows, 4, 4, 0).iterate(7)
    next(iterator)  # the step after it is being read now
    assert threading.active_count() > before
    iterator.close()
    assert threading.active_count() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_pinned_staging_gives_the_same_rows_on_a_gpu(corpus, tokenizer):
    rows = train_rows(corpus, tokenizer)
    loader, plain = (RowLoader(rows, 8, 4, 0, device=device) for device in ("cuda", "cpu"))
    for step, batches in itertools.islice(loader.iterate(), 100):
        assert batches[0][0].is_cuda
        assert torch.equal(rows_of(batches)[0].cpu(), rows_of(plain.step(step))[0])


@pytest.mark.parametrize(("rows", "batch", "world_size"), [(8, 3, 1), (8, 8, 2), (0, 4, 1), (6, 4, 1)])
def test_batch_that_does_not_divide(corpus, tokenizer, rows, batch, world_size):
    with pytest.raises(ValueError, match=r"--total-batch-size.*--device-batch-size.*multiple of \d+") as caught:
        RowLoader(train_rows(corpus, tokenizer), rows, batch, 0, world_size=world_size)
    assert str(batch * world_size * T) in str(caught.value)


# --- rows on disk


def test_rows_are_packed_once_for_each_tokenizer_and_length(corpus, tokenizer, capsys):
    first = train_rows(corpus, tokenizer)
    assert first.open(0).rows_RT1.dtype == np.uint16
    capsys.readouterr()
    again = train_rows(corpus, tokenizer)
    assert np.array_equal(again.open(0).rows_RT1, first.open(0).rows_RT1)
    assert capsys.readouterr().out == "", "nothing is tokenized again"
    other = train_rows(corpus, Tokenizer.train_from_iterator(TEXTS, 280))
    assert other.open(0).rows_RT1.max() < 280
    assert TextRows(corpus, "train", tokenizer, 2 * T).open(0).rows_RT1.shape[1] == 2 * T + 1


def test_threads_that_want_one_shard_make_it_once(corpus, tokenizer, capsys):
    together = threading.Barrier(4)

    def read():
        rows = train_rows(corpus, tokenizer)
        together.wait()
        rows.count(0)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capsys.readouterr().out.count("shard_00000") == 1


def test_training_shard_that_changed(corpus, tokenizer):
    list_shards(corpus, "train")[1].write_bytes(parquet_bytes(TEXTS[:5]))
    loader = RowLoader(train_rows(corpus, tokenizer), 4, 4, 0)
    with pytest.raises(ValueError, match=r"shard_00001\.parquet is not the file"):
        _ = loader.rows_in_epoch


def test_error_in_the_thread_reaches_the_consumer(corpus, tokenizer):
    rows = train_rows(corpus, tokenizer)
    (list_shards(corpus, "train")[0]).write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard_00000\.parquet is not the file"):
        next(RowLoader(rows, 4, 4, 0).iterate())


def test_damaged_rows(corpus, tokenizer):
    rows = train_rows(corpus, tokenizer)
    rows.count(0)
    path = rows.folders[0] / "rows.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"rows\.bin is missing or damaged: delete"):
        rows.open(0)


def test_run_that_starts_early_waits_for_later_shards_and_sees_the_same_rows(corpus, tokenizer, capsys):
    """Shards of a hub's dataset arrive one after another; a manifest that is not complete says so."""
    set_in_manifest(corpus, shuffled=True)
    everything = RowLoader(train_rows(corpus, tokenizer), 8, 8, 0)
    expected = [rows_of(everything.step(step))[0] for step in range(200)]
    for path in dataset_dir(corpus).glob("rows_*/*/meta.json"):
        path.parent.rename(path.parent.with_name(f"old-{path.parent.name}"))
    set_in_manifest(corpus, complete=False)
    late = list_shards(corpus, "train")[1:]
    for path in late:
        path.rename(path.with_suffix(".late"))
    steps = RowLoader(train_rows(corpus, tokenizer), 8, 8, 0).iterate()
    early = [rows_of(next(steps)[1])[0] for _ in range(2)]
    arrival = threading.Timer(0.3, lambda: [path.with_suffix(".late").rename(path) for path in reversed(late)])
    arrival.start()
    rest = [rows_of(next(steps)[1])[0] for _ in range(198)]
    arrival.join()
    assert "waiting for" in capsys.readouterr().out
    assert torch.equal(torch.stack(early + rest), torch.stack(expected))


def test_shard_that_never_arrives_is_named(corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(token_shards, "ARRIVAL_TIMEOUT", 0.2)
    set_in_manifest(corpus, complete=False, shuffled=True)
    list_shards(corpus, "train")[2].unlink()
    loader = RowLoader(train_rows(corpus, tokenizer), 4, 4, 0)
    loader.step(0)
    with pytest.raises(ValueError, match=r"shard_00002\.parquet has not arrived"):
        _ = loader.rows_in_epoch


# --- conversations


def conversations(tokenizer, count=100):
    """Conversation i is BOS, i, and up to T-1 more ids, with a mask on its second half."""
    bos = tokenizer.get_bos_token_id()
    for i in range(count):
        ids = [bos, i, *((7 * i + j) % 250 for j in range(i % T))]
        yield ids, [int(j > len(ids) // 2) for j in range(len(ids))]


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))


def test_conversations_stay_whole_and_only_supervised_tokens_are_targets(base_dir, tokenizer):
    bos = tokenizer.get_bos_token_id()
    items = list(conversations(tokenizer))
    loader = RowLoader(pack_masked("sft", iter(items), tokenizer, T), 1, 1, 0)
    seen = Counter()
    targets_seen = Counter()
    for step in range(loader.rows_in_epoch):
        ((inputs, targets),) = loader.step(step)
        row, wanted = inputs[0].tolist(), targets[0].tolist()
        targets_seen.update(token for token in wanted if token != -1)
        assert row[0] == bos
        at = 0
        while at < T:
            assert row[at] == bos, "a conversation or padding begins where the last conversation ended"
            if at + 1 == T or row[at + 1] == bos:
                assert wanted[at] == -1, "padding is no target"
                at += 1
                continue
            ids, mask = items[row[at + 1]]
            assert row[at : at + len(ids)] == ids[: T - at], "whole, but for a last token that is a target only"
            assert at + len(ids) <= T + 1
            following = [token if m else -1 for token, m in zip(ids[1:], mask[1:])]
            assert wanted[at : at + len(ids)] == [*following, -1][: T - at], "the next BOS is no target"
            seen[ids[1]] += 1
            at += len(ids)
    assert max(seen.values()) == 1
    assert {i for i, (_, mask) in enumerate(items) if any(mask)} <= seen.keys()
    assert targets_seen == Counter(token for ids, mask in items for token, m in zip(ids, mask) if m)


def test_conversations_are_kept_by_content(base_dir, tokenizer):
    items = list(conversations(tokenizer, 10))
    one, same = (pack_masked("sft", items, tokenizer, T) for _ in range(2))
    assert one.folders == same.folders
    assert [path.name for path in one.folders[0].parent.iterdir()] == [one.folders[0].name]
    ids, mask = items[3]
    items[3] = ids, [0] * len(mask)
    assert pack_masked("sft", items, tokenizer, T).folders != one.folders


def test_no_conversation_or_one_too_long(base_dir, tokenizer):
    with pytest.raises(ValueError, match="anything to learn"):
        pack_masked("sft", [], tokenizer, T)
    with pytest.raises(ValueError, match="truncate"):
        pack_masked("sft", [([1] * (T + 2), [0] + [1] * (T + 1))], tokenizer, T)
