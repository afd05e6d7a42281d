"""Loading folders of safetensors: shards, types, what does not fit, what is hostile; and tokenizers."""

import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")
import tiny_hf
import tokenizers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from nanochat import hf
from nanochat.hf.tokenizer import HFTokenizer

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data" / "base_data"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Qwen3, in one file and in shards."""
    model, folder = tiny_hf.make("qwen3", head_dim=16), tmp_path_factory.mktemp("qwen3")
    whole, shards = tiny_hf.save(model, folder / "whole"), tiny_hf.save(model, folder / "shards", max_shard_size="60KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    return whole, shards


@pytest.fixture(params=["whole", "shards"])
def folder(request, saved, tmp_path):
    """A copy of either to do harm to."""
    return shutil.copytree(saved[request.param == "shards"], tmp_path / "model")


def edit(path, **changes):
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value != "absent"}))


def refusal(folder):
    """The line with which a folder is refused."""
    with pytest.raises(ValueError) as caught:
        hf.load(folder, "cpu", torch.float32)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_shards_and_one_file_are_the_same_model(saved):
    one, many = (hf.load_model(folder, "cpu", torch.float32).state_dict() for folder in saved)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(saved, dtype):
    model = hf.load_model(saved[0], "cpu", dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_weights_are_views_of_the_file_and_made_once(saved, tmp_path):
    """200 MB of weights: mapped, they are the file's pages, which are shared; converted, they are in memory once."""
    tiny_hf.save(tiny_hf.make("gpt2", n_embd=1024, n_layer=4, n_head=8), tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size >> 20
    assert size > 190
    code = (
        "import re, sys, torch; from nanochat import hf\n"
        "MB = lambda what: int(re.search(what + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) >> 10\n"
        "hf.load_model(sys.argv[3], 'cpu')  # torch's own memory for such work\n"
        "own, all = MB('RssAnon'), MB('VmRSS')\n"
        "model = hf.load_model(sys.argv[1], 'cpu', getattr(torch, sys.argv[2]))\n"
        "print(MB('RssAnon') - own, MB('VmHWM') - all)"
    )

    def measure(dtype):
        run = [sys.executable, "-c", code, str(tmp_path), dtype, str(saved[0])]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return [int(n) for n in subprocess.run(run, env=environment, capture_output=True, text=True).stdout.split()]

    own, peak = measure("float32")
    assert own < 0.2 * size and peak < 1.2 * size
    own, peak = measure("bfloat16")
    assert own < 0.7 * size and peak < 1.7 * size, (
        "pages of the file, which can be dropped, and a copy of half its size"
    )


@pytest.mark.parametrize(("bad", "dtype"), [(float("nan"), torch.float32), (-float("inf"), torch.bfloat16)])
def test_weights_that_are_not_finite_are_said(folder, capsys, bad, dtype):
    hf.load(folder, "cpu", dtype)
    assert capsys.readouterr() == ("", "")
    path = max(folder.glob("*.safetensors"))
    state = load_file(path)
    name = max(state)
    state[name].view(-1)[-1] = bad
    save_file(state, path)
    hf.load(folder, "cpu", dtype)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert name.removeprefix("model.") in err and str(folder) in err


def test_large_finite_weights_are_not(saved, tmp_path, capsys):
    """In float16 their sum overflows, which is not to be taken for a weight that is infinite."""
    folder = shutil.copytree(saved[0], tmp_path / "model")
    path = folder / "model.safetensors"
    save_file({name: torch.full_like(value, 3e4) for name, value in load_file(path).items()}, path)
    hf.load(folder, "cpu", torch.float16)
    assert capsys.readouterr().err == ""


def test_what_does_not_fit_is_named(folder):
    path = max(folder.glob("*.safetensors"))
    state = load_file(path)
    name = max(state)
    save_file({**state, name: state[name][:-1].contiguous()}, path)
    assert f"{name} is of another shape" in refusal(folder)
    save_file({**state, name: state[name].int()}, path)
    assert f"{name} is of another type, I32" in refusal(folder)
    save_file({key: value for key, value in state.items() if key != name}, path)
    assert f"{name.removeprefix('model.')} is missing" in refusal(folder)
    save_file({**state, "model.layers.9.extra": torch.zeros(2)}, path)
    assert "model.layers.9.extra is not the model's" in refusal(folder)
    path.unlink()
    assert path.name in refusal(folder)
    os.mkfifo(path)  # opening it would wait forever
    assert path.name in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}, ["deepseek_v3", "not supported"]),
        ({"model_type": "absent"}, ["model_type"]),
        ({"hidden_size": "absent"}, ["hidden_size", "required"]),
        ({"hidden_size": "64"}, ["hidden_size", "integer"]),
        ({"hidden_size": 10**15}, ["hidden_size"]),
        ({"hidden_size": 1 << 28, "intermediate_size": 1 << 28, "vocab_size": 1 << 28}, ["of another shape"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers"]),
        ({"num_attention_heads": 0}, ["num_attention_heads"]),
        ({"num_key_value_heads": 3}, ["share"]),
        ({"head_dim": 15}, ["pairs"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps"]),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2}}, ["longrope"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["factor"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"rope_parameters": [1]}, ["rope_parameters"]),
        ({"rope_parameters": {"rope_theta": 1}}, ["rope_theta"]),
        ({"rope_parameters": {"rope_theta": 10**400}}, ["rope_theta"]),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}},
            ["high"],
        ),
        ({"layer_types": ["linear_attention"] * 3}, ["linear_attention"]),
        ({"layer_types": ["full_attention"]}, ["layer_types"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["gptq"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings"]),
    ],
)
def test_config_is_checked(saved, tmp_path, changes, words):
    folder = shutil.copytree(saved[0], tmp_path / "model")
    edit(folder / "config.json", **changes)
    line = refusal(folder)
    assert all(word in line for word in words)


@pytest.mark.parametrize("text", ["[]", "{", "", "null", '{"model_type": 3}', "[" * 10**5, '{"a":' * 10**5])
def test_config_that_is_none(saved, tmp_path, text):
    folder = shutil.copytree(saved[0], tmp_path / "model")
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "", None, ["a"]])
def test_index_that_leads_out_of_the_folder(saved, tmp_path, file):
    folder = shutil.copytree(saved[1], tmp_path / "model")
    shutil.copy(saved[0] / "model.safetensors", tmp_path / "secret.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], file)
    (folder / INDEX).write_text(json.dumps(index))
    assert INDEX in refusal(folder)


def test_a_tensor_in_two_shards(saved, tmp_path):
    folder = shutil.copytree(saved[1], tmp_path / "model")
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: load_file(first)[name]}, second)
    line = refusal(folder)
    assert name in line and second.name in line


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['BOMB']}",)


def header(entries, pad=0):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(pad)


HUGE = {"model.norm.weight": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 1 << 40]}}
HOSTILE = {
    "pickle": pickle.dumps,
    "length of a billion": lambda bomb: struct.pack("<Q", 10**9) + b"{" + b" " * 100,
    "length below the library's limit": lambda bomb: struct.pack("<Q", 99_000_000) + b"{" + b" " * 100,
    "length of everything": lambda bomb: struct.pack("<Q", 2**64 - 1) + b"{}",
    "absurd shape": lambda bomb: header(HUGE),
    "beyond the end": lambda bomb: header({"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}, 16),
    "overlapping": lambda bomb: header({n: {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]} for n in "ab"}, 8),
    "empty": lambda bomb: b"",
    "cut": lambda bomb: header(HUGE)[:20],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_weights_are_refused_before_anything_is_run_or_allocated(saved, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    folder = shutil.copytree(saved[0], tmp_path / "model")
    (folder / "model.safetensors").write_bytes(HOSTILE[kind](Bomb()))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (folder / "modeling_evil.py").write_text(f"open({os.environ['BOMB']!r}, 'w')")
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "model.safetensors" in refusal(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    (folder / "model.safetensors").unlink()
    assert "other formats are not read" in refusal(folder)
    assert not (tmp_path / "exploded").exists()


def test_truncated_weights(folder):
    path = max(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    assert path.name in refusal(folder)


def llama2_like():
    """A vocabulary with U+2581 for spaces and bytes for what has no token, as Llama 2 and Mistral have."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    vocab = {piece: i for i, piece in enumerate([*pieces, *map("".join, merges)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True))
    parts = tokenizers.normalizers
    tokenizer.normalizer = parts.Sequence([parts.Prepend("▁"), parts.Replace(" ", "▁")])
    parts = tokenizers.decoders
    steps = [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)]
    tokenizer.decoder = parts.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def texts():
    """Lines of public text where they are at hand, and some that are hard."""
    result = [*tiny_hf.TEXT, "", " ", "\n\n", "🎉" * 30, "the <|im_end|> of it </s>"]
    if DATA.is_dir():
        import pyarrow.parquet as pq

        documents = pq.ParquetFile(min(DATA.glob("*.parquet"))).read_row_group(0)["text"].to_pylist()
        result += [text[:2000] for text in documents[:40]]
    return result


@pytest.mark.parametrize("make", [tiny_hf.byte_level, llama2_like])
def test_tokenizer_ids_and_text(make, tmp_path):
    make().save(str(tmp_path / "tokenizer.json"))
    ours = HFTokenizer.from_directory(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    marks = {token.content for token in theirs.get_added_tokens_decoder().values()}
    for text, ids in zip(texts(), ours.encode(texts())):
        if not any(mark in text for mark in marks):
            assert ids == theirs.encode(text, add_special_tokens=False).ids == ours.encode_marked(text)
        assert ids == ours.encode(text)
        plain = theirs.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids).removeprefix(" " if make is llama2_like else "") == plain
        assert ours.decode_bytes(ids) == b"".join(ours.decode_bytes([i]) for i in ids), "byte by byte, as streams need"


def test_special_tokens_are_not_read_from_text(saved):
    tokenizer = HFTokenizer.from_directory(saved[0])
    special = tokenizer.encode_special("<|im_end|>")
    assert special not in tokenizer.encode("a<|im_end|>b")
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b")) == "a<|im_end|>b"
    assert tokenizer.encode_marked("a<|im_end|>b").count(special) == 1
    assert special not in tokenizer.encode("a<|im_end|>b"), "also after that"
    assert tokenizer.encode("hi", prepend="<|im_start|>", append=special)[:: len(tokenizer.encode("hi")) + 1] == [
        tokenizer.encode_special("<|im_start|>"),
        special,
    ]
    assert tokenizer.decode(tokenizer.encode("\ud800x")) == "\ufffdx"
    assert tokenizer.decode([10**6, *tokenizer.encode("a")]) == "a", "a padded row of the embedding"
    with pytest.raises(ValueError, match="no special token"):
        tokenizer.encode_special("<|nobody|>")


def test_token_bytes_count_text(saved):
    tokenizer = HFTokenizer.from_directory(saved[0])
    for text in tiny_hf.TEXT:
        assert sum(tokenizer.token_bytes[i] for i in tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.token_bytes[tokenizer.encode_special("<|im_end|>")] == 0


def test_ids_that_begin_and_end(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "model")
    assert HFTokenizer.from_directory(folder).get_bos_token_id() == 0, "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=tiny_hf.byte_level(), bos_token="<|im_start|>", eos_token="<|im_end|>"
    ).save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0, 77]}')
    edit(folder / "config.json", eos_token_id=78)
    tokenizer = HFTokenizer.from_directory(folder)
    assert (
        tokenizer.get_bos_token_id() == tokenizer.special_tokens["<|bos|>"] == tokenizer.encode_special("<|im_start|>")
    )
    assert tokenizer.stop_tokens == {2, 0, 77, 78}
    llama2_like().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()
    assert HFTokenizer.from_directory(folder).get_bos_token_id() is None


HUGE_ID = '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 4294967295}, "merges": []}, "added_tokens": []}'


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": {"type": "Magic"}}', HUGE_ID])
def test_damaged_tokenizer(saved, tmp_path, text):
    folder = shutil.copytree(saved[0], tmp_path / "model")
    (folder / "tokenizer.json").write_text(text)
    assert "tokenizer.json" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refusal(folder)


@torch.no_grad()
def test_memory_is_flat_over_many_loads(saved):
    """A hundred cycles of loading, one forward, and letting go."""

    def cycle():
        model, tokenizer = hf.load(saved[1], "cpu", torch.float32)
        model(torch.tensor([tokenizer.encode("Once upon a time")]))

    def resident():
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4  # kB

    for _ in range(10):
        cycle()
    before = resident()
    for _ in range(100):
        cycle()
    assert resident() - before < 8_000
