"""Checkpoints in and out: the original layout, transformers' NanoChat, and bundles with their own code."""

import dataclasses
import json
import os
import pickle

import pytest
import torch

pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")
from safetensors.torch import save_file

from nanochat import checkpoint
from nanochat.hf import convert
from nanochat.hf.tokenizer_convert import find_tokenizer, from_tokenizer_json, read_pickled, to_tokenizer_json
from nanochat.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["The quick brown fox, it's 12345!\n\n", "Grüße aus 東京 👩‍👩‍👧 — naïve", "def f(x):\n    return x**2\n"] * 30
SHAPE = {"sequence_len": 256, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
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


def original_state(config, new, seed=0):
    """A checkpoint as the original writes it: random weights under its names. new: the architecture of 2026."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    C, n, kv = config["n_embd"], config["n_layer"], config["n_kv_head"] * config["n_embd"] // config["n_head"]
    V = -(-config["vocab_size"] // 64) * 64 if new else config["vocab_size"]
    state = {"transformer.wte.weight": matrix(V, C) * 8, "lm_head.weight": matrix(V, C) * 3}
    for i in range(n):
        h = f"transformer.h.{i}"
        state |= {f"{h}.attn.c_q.weight": matrix(C, C), f"{h}.attn.c_k.weight": matrix(kv, C)}
        state |= {f"{h}.attn.c_v.weight": matrix(kv, C), f"{h}.attn.c_proj.weight": matrix(C, C)}
        state |= {f"{h}.mlp.c_fc.weight": matrix(4 * C, C), f"{h}.mlp.c_proj.weight": matrix(C, 4 * C)}
        if new and (n - 1 - i) % 2 == 0:
            state[f"{h}.attn.ve_gate.weight"] = matrix(config["n_kv_head"], 12)
            state[f"value_embeds.{i}.weight"] = matrix(V, kv)
    if new:
        state |= {"resid_lambdas": 1 + matrix(n) / 3, "x0_lambdas": matrix(n), "smear_gate.weight": matrix(1, 24)}
        state |= {"smear_lambda": torch.tensor([0.7]), "backout_lambda": torch.tensor([0.3])}
    return state


def recompute(state, config, idx_T, new):
    """The original's function of one row, written out plainly: no batch, no cache, one head at a time."""

    def rms(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    n, H, K = config["n_layer"], config["n_head"], config["n_kv_head"]
    D, T = config["n_embd"] // H, len(idx_T)
    base, sharp = (100_000, 1.2) if new else (10_000, 1.0)
    angle = torch.arange(T)[:, None] * base ** -(torch.arange(0, D, 2) / D)
    cos, sin = angle.cos(), angle.sin()

    def turn(x):  # by minus theta
        a, b = x[:, : D // 2], x[:, D // 2 :]
        return torch.cat((a * cos + b * sin, b * cos - a * sin), 1)

    x = rms(state["transformer.wte.weight"][idx_T])
    if new:
        gate = torch.sigmoid(x[1:, :24] @ state["smear_gate.weight"].T) * state["smear_lambda"]
        x = torch.cat((x[:1], x[1:] + gate * x[:-1]))
    x0, short = x, -(-config["sequence_len"] // 4 // 128) * 128
    pattern = config.get("window_pattern", "L")
    for i in range(n):
        w = {k.removeprefix(f"transformer.h.{i}."): v for k, v in state.items() if k.startswith(f"transformer.h.{i}.")}
        if new:
            x = state["resid_lambdas"][i] * x + state["x0_lambdas"][i] * x0
        h = rms(x)
        q, k, v = (h @ w[f"attn.c_{name}.weight"].T for name in "qkv")
        if f"value_embeds.{i}.weight" in state:
            share = 3 * torch.sigmoid(h[:, :12] @ w["attn.ve_gate.weight"].T)
            v = v + share.repeat_interleave(D, 1) * state[f"value_embeds.{i}.weight"][idx_T]
        window = short if pattern[i % len(pattern)] == "S" and i < n - 1 else config["sequence_len"]
        apart = torch.arange(T)[:, None] - torch.arange(T)
        heads = []
        for head in range(H):
            at, kv = slice(head * D, head * D + D), slice(head // (H // K) * D, head // (H // K) * D + D)
            scores = (rms(turn(q[:, at])) * sharp) @ (rms(turn(k[:, kv])) * sharp).T / D**0.5
            heads.append(scores.masked_fill((apart < 0) | (apart >= window), -torch.inf).softmax(-1) @ v[:, kv])
        x = x + torch.cat(heads, 1) @ w["attn.c_proj.weight"].T
        x = x + (rms(x) @ w["mlp.c_fc.weight"].T).relu() ** 2 @ w["mlp.c_proj.weight"].T
        if i == n // 2:
            middle = x
    x = rms(x - state["backout_lambda"] * middle) if new else rms(x)
    return 15 * torch.tanh((x @ state["lm_head.weight"].T)[:, : config["vocab_size"]] / 15)


def write_original(folder, tokenizer, new, prefix="", **changes):
    """A checkpoint of 2026 or of 2025 with its tokenizer, where the original keeps them."""
    config = {**SHAPE, "vocab_size": tokenizer.get_vocab_size(), **({"window_pattern": "SSSL"} if new else {})}
    state = original_state(config, new) | changes
    where = folder / "base_checkpoints" / "d4"
    where.mkdir(parents=True)
    torch.save({"never": "read"}, where / "optim_000700_rank0.pt")
    torch.save({f"{prefix}{name}": value for name, value in state.items()}, where / "model_000700.pt")
    torch.save({}, where / "model_000650.pt")
    (where / "meta_000700.json").write_text(json.dumps({"model_config": config, "user_config": {}, "val_bpb": 0.9}))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer.encoding))
    return where, state, config


@pytest.mark.parametrize("new", [True, False])
@torch.no_grad()
def test_import_of_the_original_layout(base, tmp_path, tokenizer, new):
    where, state, config = write_original(tmp_path / "theirs", tokenizer, new, "_orig_mod." if new else "")
    convert.import_checkpoint(where, "base", "theirs")
    model, ours, meta = checkpoint.load_model("base", "cpu", "theirs")
    assert ours.hash == tokenizer.hash and meta["val_bpb"] == 0.9 and meta["original_step"] == 700
    idx_T = torch.randint(config["vocab_size"], (200,), generator=torch.Generator().manual_seed(1))
    wanted = recompute(state, config, idx_T, new)
    assert ((model(idx_T[None])[0] - wanted).abs().max() / wanted.abs().max()) < 1e-4
    with pytest.raises(ValueError, match="another --tag"):
        convert.import_checkpoint(where, "base", "theirs")


def test_another_tokenizer_is_not_overwritten(base, tmp_path, tokenizer):
    own = Tokenizer.train_from_iterator(TEXTS[:3], 300)
    own.save(base / "tokenizer")
    where, _, _ = write_original(tmp_path / "theirs", tokenizer, True)
    convert.import_checkpoint(where, "base", "theirs")
    assert load_tokenizer().hash == own.hash
    assert checkpoint.load_model("base", "cpu", "theirs")[1].hash == tokenizer.hash


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['BOMB']}",)


@pytest.fixture
def theirs(base, tmp_path, monkeypatch, tokenizer):
    """An original checkpoint to do harm to: its model file, meta file, tokenizer, and state dict."""
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    where, state, _ = write_original(tmp_path / "theirs", tokenizer, True)
    pickled = tmp_path / "theirs" / "tokenizer" / "tokenizer.pkl"
    return where / "model_000700.pt", where / "meta_000700.json", pickled, state


def refusal(folder):
    """The line with which an import is refused; nothing of the folder has been run or imported then."""
    with pytest.raises(ValueError) as caught:
        convert.import_checkpoint(folder, "base", "x")
    line = str(caught.value)
    assert "\n" not in line
    assert not os.path.exists(os.environ["BOMB"])
    assert checkpoint.list_steps("base", "x") == []
    return line


@pytest.mark.parametrize("content", [Bomb(), {"a": Bomb()}, {"a": 3}, [1]])
def test_a_model_file_that_is_no_dict_of_tensors(theirs, content):
    model, _, _, _ = theirs
    torch.save(content, model)
    assert "model_000700.pt" in refusal(model.parent)


def test_a_model_file_that_torch_did_not_write(theirs):
    model, _, _, _ = theirs
    whole = model.read_bytes()
    for content in (pickle.dumps(Bomb()), whole[:-500], b""):
        model.write_bytes(content)
        assert "model_000700.pt" in refusal(model.parent)


def test_tensors_that_do_not_fit(theirs):
    model, _, _, state = theirs
    torch.save({**state, "evil": torch.zeros(2)}, model)
    assert "evil" in refusal(model.parent)
    torch.save({name: value for name, value in state.items() if "c_fc" not in name}, model)
    assert "mlp.up" in refusal(model.parent)
    torch.save({**state, "lm_head.weight": state["lm_head.weight"][:, :-1]}, model)
    assert "head.weight" in refusal(model.parent)
    torch.save({name: value for name, value in state.items() if not name.startswith("smear")}, model)
    assert "between the two architectures" in refusal(model.parent)


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_layer", 10**9), ("n_layer", "4"), ("n_head", 3), ("vocab_size", 10**12), ("window_pattern", "X")],
)
def test_a_meta_file_with_wrong_numbers(theirs, name, value):
    model, meta, _, _ = theirs
    values = json.loads(meta.read_text())
    values["model_config"][name] = value
    meta.write_text(json.dumps(values))
    assert name.replace("window_", "window-") in refusal(model.parent)


@pytest.mark.parametrize("text", ["[]", "{}", "{", "null"])
def test_a_meta_file_without_a_config(theirs, text):
    model, meta, _, _ = theirs
    meta.write_text(text)
    assert "meta_000700.json" in refusal(model.parent)
    meta.unlink()
    assert "meta_000700.json" in refusal(model.parent)


@pytest.mark.parametrize("content", [Bomb(), [Bomb()], {"pat_str": "a"}, 3, dataclasses.replace])
def test_a_pickle_that_is_no_tokenizer(theirs, content):
    model, _, pickled, _ = theirs
    pickled.write_bytes(pickle.dumps(content))
    assert "tokenizer.pkl" in refusal(model.parent)
    pickled.unlink()
    assert "--tokenizer" in refusal(model.parent)


@pytest.mark.parametrize("name", ["mergeable_ranks", "special_tokens", "pat_str"])
def test_a_pickled_tokenizer_with_wrong_parts(theirs, tokenizer, name):
    model, _, pickled, _ = theirs
    parts = tokenizer.encoding.__getstate__()
    ranks = dict(list(parts["mergeable_ranks"].items())[:-3])
    wrong = {"mergeable_ranks": [ranks], "special_tokens": [{}], "pat_str": [3, "("]}
    for value in wrong[name]:
        pickled.write_bytes(forge({**parts, name: value}))
        assert "tokenizer.pkl" in refusal(model.parent)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "llama"},
        {"model_type": "nanochat_gpt"},
        {"model_type": "nanochat_gpt", "gpt": 3},
        {"model_type": "nanochat_gpt", "gpt": {"n_layer": "4"}},
        {"model_type": "nanochat"},
        {"model_type": "nanochat", "hidden_act": "gelu"},
        {"model_type": "nanochat", "rope_parameters": {"rope_type": "yarn"}},
        {"model_type": "nanochat", "rope_parameters": [1]},
    ],
)
def test_a_folder_that_cannot_be_imported(base, tmp_path, monkeypatch, values):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 99}
    config = {**shape, "max_position_embeddings": 128, **values} if values["model_type"] == "nanochat" else values
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert str(tmp_path) in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert str(tmp_path) in refusal(tmp_path)


def forge(state):
    """The pickle of a tiktoken encoding with any state."""
    content = pickle.dumps(state, protocol=2)[2:-1]
    return b"\x80\x02ctiktoken.core\nEncoding\n)\x81" + content + b"b."


def test_tokenizers_convert_both_ways(tmp_path, tokenizer):
    (tmp_path / "tokenizer.json").write_text(to_tokenizer_json(tokenizer))
    back = from_tokenizer_json(tmp_path / "tokenizer.json")
    assert back.encoding._mergeable_ranks == tokenizer.encoding._mergeable_ranks
    assert back.special_tokens == tokenizer.special_tokens
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer.encoding))
    assert read_pickled(tmp_path / "tokenizer.pkl").hash == find_tokenizer(tmp_path).hash == tokenizer.hash
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\p{N}"
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer.pkl").unlink()
    with pytest.raises(ValueError, match="with the same ids"):
        find_tokenizer(tmp_path)
    for text in ("{}", "[", '{"model": {"type": "WordPiece"}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            from_tokenizer_json(tmp_path / "tokenizer.json")
