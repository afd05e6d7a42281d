"""Oracles: rustbpe's own encoder, raw bytes, tiktoken's encodings, and the command line as a user runs it."""

import argparse
import hashlib
import inspect
import json
import os
import pickle
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import rustbpe
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from record_check import check_records

from nanochat import dataset
from nanochat.common import read_sections
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, load_tokenizer
from scripts import tok_train
from scripts.tok_eval import CACHED_FILES, is_cached, measure

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = read_sections(ROOT / "scripts" / "tok_eval.txt")
CORPUS = [*SAMPLES.values(), inspect.getsource(argparse), "aaaa bbbb 日本語 " * 20]
ANY_TEXT = st.text(st.characters(exclude_categories=()))  # surrogates too
PLAIN_TEXT = st.text(st.characters(codec="utf-8"))
NOISE_AND_TEXT = st.lists(st.one_of(st.binary(max_size=3), PLAIN_TEXT.map(str.encode)))
ANY_BYTES = st.one_of(st.binary(), NOISE_AND_TEXT.map(b"".join))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_iterator(CORPUS, 1500)


def test_equals_the_encoder_of_the_trainer():
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(CORPUS), 1500 - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    ours = Tokenizer.train_from_iterator(CORPUS, 1500)
    rng = random.Random(0)
    noise = ["".join(rng.choices("aab 1234\n\r\t.,'sS日м😀\u0301\u00a0_()tT", k=40)) for _ in range(300)]
    for text in CORPUS + noise:
        assert ours.encode(text) == trainer.encode(text)


def test_training_is_deterministic_and_the_hash_follows_the_content(tokenizer):
    assert Tokenizer.train_from_iterator(CORPUS, 1500).hash == tokenizer.hash
    assert Tokenizer.train_from_iterator(CORPUS, 1400).hash != tokenizer.hash
    assert len(tokenizer.hash) == 64


def test_numbers_split_in_groups_of_two(tokenizer):
    assert max(len(re.sub(rb"\D", b"", tokenizer.decode_bytes([i]))) for i in tokenizer.encode("1234567 20482048")) <= 2
    vocabulary = [tokenizer.decode_bytes([i]) for i in range(tokenizer.get_vocab_size())]
    assert not any(re.search(rb"\d{3}", token) for token in vocabulary)


@settings(max_examples=150, deadline=None)
@given(PLAIN_TEXT)
def test_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=150, deadline=None)
@given(ANY_TEXT)
def test_text_with_lone_surrogates_encodes(tokenizer, text):
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_every_code_point_round_trips(tokenizer):
    points = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    assert tokenizer.decode(tokenizer.encode(points)) == points


@settings(max_examples=150, deadline=None)
@given(ANY_BYTES)
def test_bytes_round_trip(tokenizer, data):
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


@settings(max_examples=50, deadline=None)
@given(PLAIN_TEXT)
def test_bytes_of_text_encode_like_the_text(tokenizer, text):
    assert tokenizer.encode_bytes(text.encode()) == tokenizer.encode(text)


@pytest.mark.parametrize(
    "text", [" " * 2_000_000 + "x", "\n" * 1_000_000 + "x", "a" * 1_000_000, "\t \u00a0" * 300_000]
)
def test_long_runs_neither_overflow_nor_take_long(tokenizer, text):
    start = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - start < 4  # 0.1 to 0.6 s; 13 s when whitespace is scanned without a bound
    assert tokenizer.decode(ids) == text


def test_token_bytes_are_counted_on_raw_bytes(tokenizer):
    assert len(tokenizer.token_bytes) == tokenizer.get_vocab_size() == 1500
    for i, length in enumerate(tokenizer.token_bytes):
        special = tokenizer.decode([i]) in SPECIAL_TOKENS
        assert length == (0 if special else len(tokenizer.decode_bytes([i])))
    partial = [i for i in range(1491) if "\ufffd" in tokenizer.decode([i])]
    assert partial, "the corpus gives no token that is part of a character: the check above shows nothing"
    for text in CORPUS:
        assert sum(tokenizer.token_bytes[i] for i in tokenizer.encode(text)) == len(text.encode())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(SPECIAL_TOKENS), PLAIN_TEXT)).map("".join))
def test_special_tokens_in_text_stay_text(tokenizer, text):
    specials = {tokenizer.encode_special(name) for name in SPECIAL_TOKENS}
    for ids in (tokenizer.encode(text), tokenizer.encode([text])[0], tokenizer.encode_bytes(text.encode())):
        assert not specials & set(ids)
        assert tokenizer.decode(ids) == text


def test_prepend_append_and_lists(tokenizer):
    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|user_end|>")
    plain = tokenizer.encode("two cups")
    assert tokenizer.encode("two cups", prepend="<|bos|>", append=end) == [bos, *plain, end]
    texts = ["two cups", "", *CORPUS]
    assert tokenizer.encode(texts, prepend=bos) == [[bos, *tokenizer.encode(text)] for text in texts]
    assert tokenizer.decode([bos, *plain]) == "<|bos|>two cups"
    with pytest.raises(ValueError, match=re.escape("<|system|>")):
        tokenizer.encode_special("<|system|>")


@pytest.mark.parametrize("wrong", [1500, -1, 2**40])
def test_unknown_ids_are_refused(tokenizer, wrong):
    with pytest.raises(ValueError, match=str(wrong)):
        tokenizer.decode([65, wrong])


def test_vocabulary_sizes():
    with pytest.raises(ValueError, match="at least 265"):
        Tokenizer.train_from_iterator(CORPUS, 264)
    bytes_only = Tokenizer.train_from_iterator(CORPUS, 265)
    assert bytes_only.get_vocab_size() == 265
    assert len(bytes_only.encode("abc")) == 3


def test_small_corpus_gives_a_smaller_vocabulary(capsys):
    small = Tokenizer.train_from_iterator(["abab \ud800"], 5000)
    assert small.get_vocab_size() == len(small.token_bytes) < 300
    assert max(small.encode_special(name) for name in SPECIAL_TOKENS) == small.get_vocab_size() - 1
    assert "not 5000" in capsys.readouterr().out
    for nothing in ([], [""]):
        with pytest.raises(ValueError, match="no text"):
            Tokenizer.train_from_iterator(nothing, 300)


def test_save_and_load(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=re.escape("python -m scripts.tok_train")):
        load_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    loaded = load_tokenizer()
    assert (loaded.hash, loaded.token_bytes) == (tokenizer.hash, tokenizer.token_bytes)
    assert loaded.encode(CORPUS) == tokenizer.encode(CORPUS)
    assert pickle.loads(pickle.dumps(loaded)).encode(CORPUS) == tokenizer.encode(CORPUS)


def test_the_pattern_comes_from_the_file(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    monkeypatch.setattr("nanochat.tokenizer.SPLIT_PATTERN", r"\S|\s")
    assert Tokenizer.from_directory(tmp_path).encode("the ferry left") == tokenizer.encode("the ferry left")


def _swap_ranks(data):
    a, b = list(data["ranks"])[300:302]
    data["ranks"][a], data["ranks"][b] = data["ranks"][b], data["ranks"][a]


@pytest.mark.parametrize(
    "damage",
    [
        _swap_ranks,
        lambda data: data["ranks"].popitem(),
        lambda data: data["ranks"].update({"AA==": 5}),
        lambda data: data["ranks"].update({"A": 5}),
        lambda data: data["ranks"].update({"AA==": "x"}),
        lambda data: data.update(pattern=data["pattern"].replace("{1,2}", "{1,3}")),
        lambda data: data["special_tokens"].update({"<|bos|>": 7}),
        lambda data: data["token_bytes"].__setitem__(300, 9),
        lambda data: data.update(hash="0" * 64),
        lambda data: data.pop("ranks"),
        lambda data: data.update(version=99),
    ],
)
def test_damaged_files_are_refused_in_one_line(tokenizer, tmp_path, damage):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b'{"format": "nanochat-bpe"'])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


def test_pretrained_encodings_have_the_same_interface(tmp_path, monkeypatch):
    ranks = {bytes([255 - i]): i for i in range(256)} | {b"th": 256, b"the": 257}  # ids are not the bytes, as in gpt2
    encoding = tiktoken.Encoding(
        "tiny", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 260}
    )
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "tiny", encoding)
    tiny = Tokenizer.from_pretrained("tiny")
    assert tiny.get_bos_token_id() == 260
    assert tiny.get_vocab_size() == len(tiny.token_bytes) == 261
    assert tiny.encode("the", prepend="<|bos|>") == [260, 257]
    assert tiny.decode_bytes(tiny.encode_bytes(b"the \xff\xe6 cat")) == b"the \xff\xe6 cat"
    assert tiny.token_bytes[256:] == [2, 3, 0, 0, 0]
    with pytest.raises(ValueError, match="258"):
        tiny.decode([258])
    tiny.save(tmp_path)
    assert Tokenizer.from_directory(tmp_path).encode("the", prepend="<|bos|>") == [260, 257]


def test_unavailable_encodings_name_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="cl100k_base"):
        Tokenizer.from_pretrained("no-such-encoding")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there: as without a network
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "p50k_base", raising=False)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR"):
        Tokenizer.from_pretrained("p50k_base")


def test_cached_files_are_those_tiktoken_asks_for(tmp_path, monkeypatch):
    public = pytest.importorskip("tiktoken_ext.openai_public")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name, files in CACHED_FILES.items():
        addresses = re.findall(r'"(https://[^"]+)"', inspect.getsource(getattr(public, name)))
        assert files == tuple(hashlib.sha1(address.encode()).hexdigest() for address in addresses)
        assert not is_cached(name)
        for file in files:
            (tmp_path / file).touch()
        assert is_cached(name)


def test_measure_gives_bytes_per_token_and_ratios(tokenizer):
    row = measure(["the harbour", "日本"], {"ours": tokenizer, "single": Tokenizer.train_from_iterator(CORPUS, 265)})
    assert row["bytes"] == row["single"]["tokens"] == 11 + 6
    assert row["single"]["bytes_per_token"] == 1
    assert row["ours"]["bytes_per_token"] == row["single"]["ratio"] == 17 / row["ours"]["tokens"] > 1


def run_cli(*args: str, stdin: bytes = b"", base_dir: Path | str = "") -> subprocess.CompletedProcess:
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir)}
    command = [sys.executable, "-m", *args]
    return subprocess.run(command, input=stdin, capture_output=True, cwd=ROOT, env=environment, timeout=60)


def test_command_line_round_trips_any_bytes(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(CORPUS), encoding="utf-8")
    train = run_cli("nanochat.tokenizer", "train", str(corpus), "--vocab-size", "600", "--out", str(tmp_path / "tok"))
    assert train.returncode == 0 and b"600 tokens" in train.stdout
    data = random.Random(0).randbytes(5000) + "日本 <|bos|>\r\n\0".encode() + corpus.read_bytes()
    folder = ("--tokenizer", str(tmp_path / "tok"))
    ids = run_cli("nanochat.tokenizer", "encode", *folder, stdin=data).stdout
    assert run_cli("nanochat.tokenizer", "decode", *folder, stdin=ids).stdout == data
    (tmp_path / "ids.txt").write_bytes(ids)
    assert run_cli("nanochat.tokenizer", "decode", *folder, str(tmp_path / "ids.txt")).stdout == data
    train = run_cli(
        "nanochat.tokenizer", "train", "-", "--vocab-size=600", "--out", str(tmp_path / "piped"), stdin=data
    )
    assert train.returncode == 0 and (tmp_path / "piped" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("args", "stdin", "says"),
    [
        ([], b"", b"command"),
        (["train", "{corpus}", "--vocab-size", "100", "--out", "{dir}"], b"", b"--vocab-size"),
        (["train", "{corpus}", "--vocab-size", "many", "--out", "{dir}"], b"", b"--vocab-size"),
        (["train", "{dir}/absent.txt", "--out", "{dir}"], b"", b"absent.txt"),
        (["train", "-", "--out", "{dir}"], b"", b"no text"),
        (["encode"], b"text", b"python -m scripts.tok_train"),
        (["encode", "--tokenizer", "{dir}", "{dir}/absent.txt"], b"", b"absent.txt"),
        (["decode", "--tokenizer", "{dir}"], b"12 twelve", b"twelve"),
        (["decode", "--tokenizer", "{dir}"], b"999999", b"999999"),
    ],
)
def test_command_line_errors_are_one_line_and_exit_2(tokenizer, tmp_path, args, stdin, says):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("some words")
    tokenizer.save(tmp_path)
    filled = [arg.format(corpus=corpus, dir=tmp_path) for arg in args]
    result = run_cli("nanochat.tokenizer", *filled, stdin=stdin, base_dir=tmp_path / "base")
    assert result.returncode == 2
    assert says in result.stderr and len(result.stderr.splitlines()) == 1


def test_scripts_train_and_measure_on_a_dataset(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    lines = [json.dumps({"text": f"{text} Document {i}."}) for i in range(20) for text in SAMPLES.values()]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    base = tmp_path / "base"
    absent = run_cli("scripts.tok_train", base_dir=base)
    assert absent.returncode == 2 and b"nanochat.dataset" in absent.stderr
    assert run_cli("nanochat.dataset", "--name", str(folder), base_dir=base).returncode == 0
    flags = ("--dataset", str(folder), "--vocab-size", "700", "--max-chars", "30000", "--doc-cap", "200")
    train = run_cli("scripts.tok_train", *flags, base_dir=base)
    assert train.returncode == 0, train.stderr
    record = json.loads((base / "evals" / "tok_train.json").read_text())
    saved = Tokenizer.from_directory(base / "tokenizer")
    assert (record["vocab_size"], record["hash"]) == (700, saved.hash)
    assert record["chars"] == 30000 and record["documents"] >= 150 and record["bytes_per_token"] > 1
    assert {"commit", "hardware", "versions", "date", "seconds"} <= record.keys()
    measured = run_cli("scripts.tok_eval", "--dataset", str(folder), base_dir=base)
    assert measured.returncode == 0, measured.stderr
    texts = json.loads((base / "evals" / "tok_eval.json").read_text())["texts"]
    assert texts.keys() == {*SAMPLES, "validation"}
    for name, text in SAMPLES.items():
        assert texts[name]["ours"]["tokens"] == len(saved.encode(text))
        assert texts[name]["bytes"] == len(text.encode())
    assert {"evals/tok_train.json", "evals/tok_eval.json"} <= check_records(base)


def test_long_documents_give_more_where_others_have_no_more(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    folder = tmp_path / "texts"
    folder.mkdir()
    documents = ["a" * 900, "b" * 50, "c" * 120]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (folder / "val.jsonl").write_text('{"text": "validation"}\n')
    dataset.prepare(str(folder))

    def given(max_chars):
        seen = Counter()
        config = tok_train.Config(dataset=str(folder), max_chars=max_chars, doc_cap=100)
        text = "".join(tok_train.training_texts(config, seen))
        assert seen["chars"] == len(text)
        return text, seen["documents"]

    assert given(120) == ("a" * 100 + "b" * 20, 2)
    assert given(300) == ("a" * 100 + "b" * 50 + "c" * 100 + "a" * 50, 3)
    assert given(5000) == ("a" * 100 + "b" * 50 + "c" * 100 + "a" * 800 + "c" * 20, 3)
