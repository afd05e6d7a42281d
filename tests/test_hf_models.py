"""Every open-weights family against transformers in fp32: logits, and greedy tokens through the engine's cache."""

import json
import types

import pytest
import torch

pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")
import tiny_hf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nanochat import hf
from nanochat.attention import attend_naive
from nanochat.engine import Engine
from nanochat.hf import gpt_oss as hf_gpt_oss

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 150000.0,
}
HEADS = {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 3}
FULL = ["full_attention"] * 3
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
CASES = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied-wide": ("gpt2", {"tie_word_embeddings": False, "n_inner": 80}),
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama-yarn": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.1}}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "smollm": ("llama", {"tie_word_embeddings": True, **HEADS}),
    "mistral-window": ("mistral", {"sliding_window": 8, "num_key_value_heads": 1}),
    "mistral-full": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": ("qwen2", WINDOW),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-tied-windows": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True, **WINDOW}),
    "gpt-oss": ("gpt_oss", {}),
    "gpt-oss-yarn-truncated": ("gpt_oss", {"rope_parameters": {**YARN, "truncate": True}, "num_key_value_heads": 4}),
    "gpt-oss-other": ("gpt_oss", {"swiglu_limit": 2.0, "num_experts_per_tok": 1, "layer_types": FULL}),
}
NO_TOKENIZER = types.SimpleNamespace(special_tokens={}, stop_tokens=frozenset())  # all that the engine needs


def prompts(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(tiny_hf.VOCAB, (n,), generator=generator).tolist() for n in lengths]


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def check(model, oracle, tolerance, new=80):
    """Logits of a long row; then what the engine makes of a batch of mixed lengths is what the oracle would choose."""
    row = torch.tensor(prompts(100))
    ours = model(row)
    theirs = oracle(row).logits
    assert ours.dtype == torch.float32
    assert relative(ours, theirs) < tolerance
    engine = Engine(model, NO_TOKENIZER, max_batch=3)
    batch = prompts(5, 23, 1, 11)
    for prompt, output in zip(batch, engine.complete(batch, new)):
        assert len(output) == new
        logits = oracle(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        assert output == logits.argmax(-1).tolist()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_family(case, tmp_path):
    kind, settings = CASES[case]
    oracle = tiny_hf.make(kind, **settings)
    tiny_hf.save(oracle, tmp_path)
    model, _ = hf.load(tmp_path, "cpu", torch.float32)
    assert model.config.sequence_len == 256 and model.config.vocab_size == tiny_hf.VOCAB
    assert model.device == torch.device("cpu")
    check(model, oracle, 1e-5 if kind == "gpt_oss" else 1e-4)


@torch.no_grad()
def test_old_spelling_of_rotary_settings(tmp_path):
    """`rope_theta` beside `rope_scaling`, whose kind is called `type`."""
    oracle = tiny_hf.make("llama", rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    config = json.loads((tiny_hf.save(oracle, tmp_path) / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    row = torch.tensor(prompts(60))
    assert relative(hf.load_model(tmp_path, "cpu", torch.float32)(row), oracle(row).logits) < 1e-4


def pack(oracle, folder, seed=3):
    """Give the oracle experts that MXFP4 can express, as transformers unpacks them, and save them packed."""
    generator = torch.Generator().manual_seed(seed)
    tiny_hf.save(oracle, folder)
    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        E, n_in, n_out = state.pop(name).shape
        blocks = torch.randint(256, (E, n_out, n_in // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 125, (E, n_out, n_in // 32), generator=generator, dtype=torch.uint8)
        state[f"{name}_blocks"] = blocks
        state[f"{name}_scales"] = scales
        oracle.get_parameter(name).copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_file(state, folder / "model.safetensors")
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))


@torch.no_grad()
def test_gpt_oss_with_packed_experts(tmp_path):
    oracle = tiny_hf.make("gpt_oss")
    pack(oracle, tmp_path)
    model = hf.load_model(tmp_path, "cpu", torch.float32)
    packed = [name for name, value in model.state_dict().items() if value.dtype == torch.uint8]
    assert len(packed) == 4 * 3, "blocks and scales of two matrices in each layer stay as they are"
    check(model, oracle, 1e-5)


@torch.no_grad()
def test_bf16_stays_near_fp32(tmp_path):
    tiny_hf.save(tiny_hf.make("qwen3", head_dim=16).to(torch.bfloat16), tmp_path)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    row = torch.tensor(prompts(50))
    low = hf.load_model(tmp_path, "cpu", torch.bfloat16)(row)
    full = hf.load_model(tmp_path, "cpu", torch.float32)(row)
    assert low.dtype == torch.float32
    assert relative(full, oracle(row).logits) < 1e-4, "the same bf16 weights, computed in fp32"
    assert relative(low, full) < 0.1


@torch.no_grad()
def test_loss_is_that_of_the_logits(tmp_path):
    model = hf.load_model(tiny_hf.save(tiny_hf.make("gpt2"), tmp_path), "cpu", torch.float32)
    rows = torch.tensor(prompts(40, 40))
    targets = torch.cat((rows[:, 1:], torch.full((2, 1), -1)), 1)
    wanted = torch.nn.functional.cross_entropy(model(rows).transpose(1, 2), targets, ignore_index=-1)
    assert abs(model(rows, targets) - wanted) < 1e-4
    assert model(rows, targets, loss_reduction="none").shape == targets.shape
    with pytest.raises(ValueError, match="exceed the model's context of 256"):
        model(torch.zeros(1, 257, dtype=torch.long))


def test_yarn_of_the_real_model():
    """The factor of cos and sin, and fast planes left alone, as the facts of gpt-oss-20b state."""
    values = {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "num_hidden_layers": 24,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    }
    config = hf_gpt_oss.GptOssConfig.from_json(values)
    assert config.rope.scale == pytest.approx(1.3465736, abs=1e-7)
    assert config.windows == [128, 131072] * 12
    plain = [150000 ** -(i / 32) for i in range(32)]
    radians = config.rope.radians_P(64).tolist()
    assert radians[:8] == pytest.approx(plain[:8])
    assert radians[-8:] == pytest.approx([turn / 32 for turn in plain[-8:]])


def test_a_sink_is_one_more_logit():
    """The closed form: what attention gives without it, times sigmoid(logsumexp - sink)."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 12, 4, 8, generator=generator)
    k = torch.randn(2, 12, 2, 8, generator=generator)
    v = torch.randn(2, 12, 2, 8, generator=generator)
    sinks = torch.randn(4, generator=generator) * 3
    scores = torch.einsum("bthd,bshd->bths", q, k.repeat_interleave(2, 2)) * 8**-0.5
    distance = torch.arange(12)[:, None] - torch.arange(12)
    is_hidden = (distance < 0) | (distance >= 6)
    scores = scores.masked_fill(is_hidden[:, None], float("-inf"))
    share = torch.sigmoid(scores.logsumexp(-1) - sinks)[..., None]
    plain = attend_naive(q, k, v, 6)
    torch.testing.assert_close(attend_naive(q, k, v, 6, sinks), plain * share)
