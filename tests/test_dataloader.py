"""The loader's order on any number of ranks; nothing lost, nothing twice, whatever arrives late or damaged."""

import itertools
import json
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hub_server import HubServer
from test_dataset import parquet_bytes, write_jsonl

from nanochat import dataset, token_shards
from nanochat.dataloader import RowLoader
from nanochat.dataset import iterate_documents, list_shards, prepare
from nanochat.token_shards import build_conversation_shards, build_token_shards
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
    for i in range(4):
        write_jsonl(folder / f"{i}.jsonl", TEXTS[60 * i : 60 * i + 60])
    prepare(str(folder))
    return "corpus"


def rows_of(batches):
    """Micro-batches as whole rows of T+1, whose two halves must agree; and their targets."""
    inputs, targets = (torch.cat(part) for part in zip(*batches))
    counted = targets != -1
    assert torch.equal(inputs[:, 1:][counted[:, :-1]], targets[:, :-1][counted[:, :-1]]), "targets are shifted by one"
    return torch.cat([inputs, targets[:, -1:]], dim=1), targets


def epoch_rows(shards, seed=0, epoch=0):
    loader = RowLoader(shards, T, 1, 1, seed)
    steps = itertools.takewhile(lambda step: loader.epoch(step) <= epoch, itertools.count())
    return torch.cat([rows_of(loader.step(step))[0] for step in steps if loader.epoch(step) == epoch])


# --- text


def test_every_token_of_the_corpus_once_an_epoch(corpus, tokenizer):
    shards = build_token_shards(corpus, "train", tokenizer)
    bos = tokenizer.get_bos_token_id()
    texts = tokenizer.encode(list(iterate_documents(list_shards(corpus, "train"))))
    expected = Counter(itertools.chain.from_iterable(texts))
    for epoch in (0, 1, 2):
        rows = epoch_rows(shards, epoch=epoch)
        assert (rows[:, 0] == bos).all()
        found = Counter(rows[(rows != bos) & (rows != -1)].tolist())
        assert found == expected
    assert len(epoch_rows(shards)) == RowLoader(shards, T, 1, 1, 0).rows_in_epoch


def test_pieces_are_runs_of_documents(corpus, tokenizer):
    """Every text between two BOS occurs in a document; and only the last row of a shard has uncounted targets."""
    shards = build_token_shards(corpus, "train", tokenizer)
    documents = "\n".join(iterate_documents(list_shards(corpus, "train")))
    loader = RowLoader(shards, T, 1, 1, 0)
    gaps = 0
    for step in range(loader.rows_in_epoch):
        rows, targets = rows_of(loader.step(step))
        gaps += bool((targets == -1).any())
        for piece in tokenizer.decode(rows[0][rows[0] >= 0].tolist()).split("<|bos|>"):
            assert piece in documents
    assert gaps <= len(shards)


def test_ranks_and_accumulation_see_the_same_rows(corpus, tokenizer):
    shards = build_token_shards(corpus, "train", tokenizer)
    whole = RowLoader(shards, T, 8, 8, seed=5)
    for step in range(0, 160, 5):
        expected = rows_of(whole.step(step))[0]
        for world_size, batch_rows in [(1, 2), (2, 2), (4, 2), (4, 1), (8, 1)]:
            got = torch.empty_like(expected)
            for rank in range(world_size):
                batches = RowLoader(shards, T, 8, batch_rows, 5, rank, world_size).step(step)
                assert [tuple(x.shape) for x, _ in batches] == [(batch_rows, T)] * (8 // world_size // batch_rows)
                got[rank::world_size] = rows_of(batches)[0]
            assert torch.equal(got, expected)
    assert whole.epoch(155) >= 2, "several epochs were compared"


def test_seed_and_epoch_change_the_order_and_nothing_else(corpus, tokenizer):
    shards = build_token_shards(corpus, "train", tokenizer)
    one, other, later = epoch_rows(shards, seed=0), epoch_rows(shards, seed=1), epoch_rows(shards, seed=0, epoch=1)
    assert torch.equal(one, epoch_rows(shards, seed=0))
    for rows in (other, later):
        assert rows.shape[0] != one.shape[0] or not torch.equal(rows, one)
        assert Counter(rows[rows > 0].tolist()).keys() == Counter(one[one > 0].tolist()).keys()


def test_resume_is_the_same_run_and_takes_no_time(corpus, tokenizer):
    through = []
    loader = RowLoader(build_token_shards(corpus, "train", tokenizer), T, 8, 4, 0)
    for step, batches in itertools.islice(loader.iterate(), 300):
        assert step == len(through)
        through.append(rows_of(batches)[0])
    for start in (1, 123, 299):
        began = time.monotonic()
        loader = RowLoader(build_token_shards(corpus, "train", tokenizer), T, 8, 4, 0)
        step, batches = next(loader.iterate(start))
        assert time.monotonic() - began < 1.0
        assert step == start
        assert torch.equal(rows_of(batches)[0], through[start])


def test_fewer_rows_than_a_step_wrap_into_later_epochs(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "tiny").mkdir()
    write_jsonl(tmp_path / "tiny" / "a.jsonl", ["one little text", "another little text"])
    prepare(str(tmp_path / "tiny"))
    loader = RowLoader(build_token_shards("tiny", "train", tokenizer), T, 8, 8, 0)
    assert loader.rows_in_epoch == 1
    rows, targets = rows_of(loader.step(3))
    assert rows.shape == (8, T + 1)
    ids = tokenizer.encode(next(iterate_documents(list_shards("tiny", "train"))))
    for row, wanted in zip(rows, targets):
        assert row[1 : len(ids) + 1].tolist() == wanted[: len(ids)].tolist() == ids
        assert (wanted[len(ids) :] == -1).all(), "what fills the last row is no target"
    assert loader.epoch(3) == 24


def test_batches_yielded_earlier_are_not_overwritten(corpus, tokenizer):
    loader = RowLoader(build_token_shards(corpus, "train", tokenizer), T, 4, 4, 0)
    kept = [batches for _, batches in itertools.islice(loader.iterate(), 20)]
    for step, batches in enumerate(kept):
        assert torch.equal(rows_of(batches)[0], rows_of(loader.step(step))[0])


def test_close_ends_the_thread(corpus, tokenizer):
    def count():
        return sum(thread.name == "rows" for thread in threading.enumerate())

    before = count()
    loader = RowLoader(build_token_shards(corpus, "train", tokenizer), T, 4, 4, 0)
    next(loader.iterate())
    iterator = loader.iterate(7)
    next(iterator)
    assert count() == before + 1
    iterator.close()
    assert count() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_pinned_staging_gives_the_same_rows_on_a_gpu(corpus, tokenizer):
    shards = build_token_shards(corpus, "train", tokenizer)
    loader, plain = (RowLoader(shards, T, 8, 4, 0, device=device) for device in ("cuda", "cpu"))
    for step, batches in itertools.islice(loader.iterate(), 100):
        assert batches[0][0].is_cuda
        assert torch.equal(rows_of(batches)[0].cpu(), rows_of(plain.step(step))[0])


@pytest.mark.parametrize(("rows", "batch", "world_size"), [(8, 3, 1), (8, 8, 2), (0, 4, 1), (6, 4, 1)])
def test_batch_that_does_not_divide(corpus, tokenizer, rows, batch, world_size):
    shards = build_token_shards(corpus, "train", tokenizer)
    with pytest.raises(ValueError, match=r"--total-batch-size.*--device-batch-size.*multiple of \d+") as caught:
        RowLoader(shards, T, rows, batch, 0, world_size=world_size)
    assert str(batch * world_size * T) in str(caught.value)


# --- token shards on disk


def test_documents_are_tokenized_once_for_each_tokenizer(corpus, tokenizer, capsys):
    first = build_token_shards(corpus, "train", tokenizer)[0]
    text = list(iterate_documents(list_shards(corpus, "train")[:1]))
    for i, ids in enumerate(tokenizer.encode(text)):
        assert first.ids[first.offsets[i] : first.offsets[i + 1]].tolist() == ids
    assert first.ids.dtype == np.uint16
    capsys.readouterr()
    again = build_token_shards(corpus, "train", tokenizer)[0]
    assert np.array_equal(again.ids, first.ids)
    assert "tokenized" not in capsys.readouterr().out
    other = build_token_shards(corpus, "train", Tokenizer.train_from_iterator(TEXTS, 280))[0]
    assert other.folder != first.folder
    assert other.ids.max() < 280


def test_threads_that_want_one_shard_make_it_once(corpus, tokenizer, capsys):
    together = threading.Barrier(4)

    def read():
        shard = build_token_shards(corpus, "train", tokenizer)[0]
        together.wait()
        shard.plan(T + 1, 0, 0)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capsys.readouterr().out.count("tokenized shard_00000") == 1


def test_training_shard_that_changed(corpus, tokenizer):
    list_shards(corpus, "train")[1].write_bytes(parquet_bytes(TEXTS[:5]))
    loader = RowLoader(build_token_shards(corpus, "train", tokenizer), T, 4, 4, 0)
    with pytest.raises(ValueError, match=r"shard_00001\.parquet is not the file"):
        _ = loader.rows_in_epoch


def test_error_in_the_thread_reaches_the_consumer(corpus, tokenizer):
    shards = build_token_shards(corpus, "train", tokenizer)
    (list_shards(corpus, "train")[0]).write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard_00000\.parquet is not the file"):
        next(RowLoader(shards, T, 4, 4, 0).iterate())


def test_damaged_token_shard(corpus, tokenizer):
    folder = build_token_shards(corpus, "train", tokenizer)[0].folder
    _ = build_token_shards(corpus, "train", tokenizer)[0].ids
    (folder / "ids.bin").write_bytes((folder / "ids.bin").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"ids\.bin is missing or damaged: delete"):
        _ = build_token_shards(corpus, "train", tokenizer)[0].ids


def test_training_starts_while_shards_are_arriving(tmp_path, monkeypatch, tokenizer, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setitem(dataset.REMOTES, "tiny", dataset.Remote("me/tiny", 4, "CC0-1.0"))
    with HubServer() as server:
        for i in range(4):
            server.files[f"shard_{i:05d}.parquet"] = parquet_bytes(TEXTS[60 * i : 60 * i + 60])
        server.faults["shard_00001.parquet"] = [("status", 404)]
        with pytest.raises(ValueError, match="404"):
            prepare("tiny", 3, mirror=server.url, workers=1)
        steps = RowLoader(build_token_shards("tiny", "train", tokenizer), T, 8, 8, 0).iterate()
        early = [rows_of(next(steps)[1])[0] for _ in range(2)]
        download = threading.Timer(0.3, prepare, ["tiny", 3], {"mirror": server.url})
        download.start()
        rest = [rows_of(next(steps)[1])[0] for _ in range(200)]
        download.join()
    assert "waiting for" in capsys.readouterr().out
    loader = RowLoader(build_token_shards("tiny", "train", tokenizer), T, 8, 8, 0)
    for step, rows in enumerate(early + rest):
        assert torch.equal(rows, rows_of(loader.step(step))[0])


def test_shard_that_never_arrives_is_named(corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(token_shards, "WAIT_SECONDS", 0.2)
    path = dataset.dataset_dir(corpus) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"complete": False}))
    list_shards(corpus, "train")[2].unlink()
    loader = RowLoader(build_token_shards(corpus, "train", tokenizer), T, 4, 4, 0)
    loader.step(0)
    with pytest.raises(ValueError, match=r"shard_00002\.parquet has not arrived"):
        _ = loader.rows_in_epoch


# --- conversations


def conversations(tokenizer, count=100, supervised=True):
    """Conversation i is BOS, i, and up to T-1 more ids, with a mask on its second half."""
    bos = tokenizer.get_bos_token_id()
    for i in range(count):
        ids = [bos, i, *((7 * i + j) % 250 for j in range(i % T))]
        yield ids, [int(supervised and j > len(ids) // 2) for j in range(len(ids))]


def test_conversations_stay_whole_and_only_supervised_tokens_are_targets(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    bos = tokenizer.get_bos_token_id()
    items = list(conversations(tokenizer))
    loader = RowLoader(build_conversation_shards("sft", items, tokenizer), T, 1, 1, 0)
    seen = Counter()
    for step in range(loader.rows_in_epoch):
        ((inputs, targets),) = loader.step(step)
        row, wanted = inputs[0].tolist(), targets[0].tolist()
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


def test_supervised_targets_all_come_once_and_rows_without_are_dropped(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    items = [*conversations(tokenizer), *conversations(tokenizer, supervised=False)]
    shards = build_conversation_shards("sft", items, tokenizer)
    expected = Counter(token for ids, mask in items for token, m in zip(ids, mask) if m)
    for epoch_seed in (0, 1):
        loader = RowLoader(shards, T, 1, 1, epoch_seed)
        rows = [loader.step(step)[0][1] for step in range(loader.rows_in_epoch)]
        assert all((targets != -1).any() for targets in rows)
        assert Counter(token for targets in rows for token in targets[targets != -1].tolist()) == expected


def test_conversations_are_kept_by_content(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    items = list(conversations(tokenizer, 10))
    one, same = (build_conversation_shards("sft", items, tokenizer)[0] for _ in range(2))
    assert one.folder == same.folder
    assert [path.name for path in one.folder.parent.iterdir()] == [one.folder.name]
    ids, mask = items[3]
    items[3] = ids, [0] * len(mask)
    assert build_conversation_shards("sft", items, tokenizer)[0].folder != one.folder


def test_conversations_without_a_target_or_too_long(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    silent = build_conversation_shards("sft", conversations(tokenizer, supervised=False), tokenizer)
    with pytest.raises(ValueError, match="no row with anything to learn"):
        RowLoader(silent, T, 4, 4, 0).step(0)
    long = build_conversation_shards("sft", [([1] * (T + 2), [0] + [1] * (T + 1))], tokenizer)
    with pytest.raises(ValueError, match="truncate"):
        RowLoader(long, T, 4, 4, 0).step(0)
