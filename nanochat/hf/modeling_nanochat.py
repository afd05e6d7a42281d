"""nanochat's GPT for transformers, whole in one file, which `scripts.models export` copies into a bundle.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

It is the network of nanochat/gpt.py, written for reading and for equal numbers; gpt.py says why each part is there. It
keeps no cache, so each new token costs a pass over all tokens before it. Nothing here imports nanochat: a bundle runs
where only transformers is.

Shapes: B rows, T positions, C channels, H query heads, K key-value heads, D head dim, V vocabulary.
"""

from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput


class NanochatGPTConfig(PretrainedConfig):
    """Config whose `gpt` is a dict with the fields of nanochat's own GPTConfig."""

    model_type = "nanochat_gpt"

    def __init__(self, gpt=None, **kwargs):
        self.gpt = gpt or {}
        super().__init__(**kwargs)


def norm(x):
    """Apply RMSNorm without parameters over the last dimension."""
    # Without this epsilon PyTorch takes that of the input's dtype, which in bf16 (0.008) is far from the training's.
    return F.rms_norm(x, (x.size(-1),), eps=torch.finfo(torch.float32).eps)


def rotate(x_BTHD, cos_BT1D, sin_BT1D):
    """Rotate the planes (channel i, channel i + D/2) by the angles of each position (rotary positions)."""
    a, b = x_BTHD.chunk(2, dim=-1)
    return torch.cat((a * cos_BT1D - b * sin_BT1D, b * cos_BT1D + a * sin_BT1D), dim=-1)


def round_up(n, multiple):
    """Return the smallest multiple that is at least n."""
    return -(-n // multiple) * multiple


class Attention(nn.Module):
    """Causal attention with grouped key-value heads; `gated` layers mix a value embedding into their values."""

    def __init__(self, gpt, gated):
        super().__init__()
        n_embd = gpt.n_embd
        self.head_dim = n_embd // gpt.n_head
        self.qk_scale = gpt.qk_scale
        kv_channels = gpt.n_kv_head * self.head_dim
        self.q = nn.Linear(n_embd, n_embd, bias=False)
        self.k = nn.Linear(n_embd, kv_channels, bias=False)
        self.v = nn.Linear(n_embd, kv_channels, bias=False)
        self.out = nn.Linear(n_embd, n_embd, bias=False)
        self.gate = None
        if gated:
            self.gate = nn.Linear(gpt.value_gate_channels, gpt.n_kv_head, bias=False)

    def forward(self, x_BTC, ve_BTC, cos_BT1D, sin_BT1D, visible_BTT):
        heads = (-1, self.head_dim)
        q_BTHD = self.q(x_BTC).unflatten(-1, heads)
        k_BTKD = self.k(x_BTC).unflatten(-1, heads)
        v_BTKD = self.v(x_BTC).unflatten(-1, heads)
        if self.gate is not None:
            # Each key-value head decides from the first channels how much of the token's value embedding it adds.
            share_BTK = 3 * torch.sigmoid(self.gate(x_BTC[..., : self.gate.in_features]))
            v_BTKD = v_BTKD + share_BTK.unsqueeze(-1) * ve_BTC.unflatten(-1, heads)
        # QK-norm after the rotation; the scale sharpens the softmax, as a norm without parameters cannot grow.
        q_BTHD = norm(rotate(q_BTHD, cos_BT1D, sin_BT1D)) * self.qk_scale
        k_BTKD = norm(rotate(k_BTKD, cos_BT1D, sin_BT1D)) * self.qk_scale
        y_BHTD = F.scaled_dot_product_attention(
            q_BTHD.transpose(1, 2),
            k_BTKD.transpose(1, 2),
            v_BTKD.transpose(1, 2),
            attn_mask=visible_BTT[:, None],
            enable_gqa=True,
        )
        return self.out(y_BHTD.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """Two matrices with ReLU squared between them."""

    def __init__(self, gpt):
        super().__init__()
        self.up = nn.Linear(gpt.n_embd, 4 * gpt.n_embd, bias=False)
        self.down = nn.Linear(4 * gpt.n_embd, gpt.n_embd, bias=False)

    def forward(self, x_BTC):
        return self.down(F.relu(self.up(x_BTC)).square())


class Block(GradientCheckpointingLayer):
    """One layer: attention, then MLP, each on the normed residual.

    After `model.gradient_checkpointing_enable()` its base class recomputes it in the backward pass.
    """

    def __init__(self, gpt, gated):
        super().__init__()
        self.attn = Attention(gpt, gated)
        self.mlp = MLP(gpt)

    def forward(self, x_BTC, ve_BTC, norm_scale_C, cos_BT1D, sin_BT1D, visible_BTT):
        x_BTC = x_BTC + self.attn(norm(x_BTC), ve_BTC, cos_BT1D, sin_BT1D, visible_BTT)
        return x_BTC + self.mlp(norm(x_BTC) * norm_scale_C)


class NanochatGPT(PreTrainedModel, GenerationMixin):
    """The model; its parameters have the names of nanochat's own checkpoints."""

    config_class = NanochatGPTConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (as its base class has it)

    def __init__(self, config):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # which loss of transformers' `loss_function` is, and Trainer counts for
        gpt = SimpleNamespace(**config.gpt)
        self.gpt = gpt
        n_layer = gpt.n_layer
        n_embd = gpt.n_embd
        kv_channels = gpt.n_kv_head * n_embd // gpt.n_head
        padded_vocab_size = round_up(gpt.vocab_size, 64)
        self.embed = nn.Embedding(padded_vocab_size, n_embd)
        self.value_embeds = nn.ModuleDict()
        self.blocks = nn.ModuleList()
        every = gpt.value_embed_every
        for i in range(n_layer):
            gated = every > 0 and (n_layer - 1 - i) % every == 0  # counted back from the last layer
            if gated:
                self.value_embeds[str(i)] = nn.Embedding(padded_vocab_size, kv_channels)
            self.blocks.append(Block(gpt, gated))
        self.head = nn.Linear(n_embd, padded_vocab_size, bias=False)
        # Each layer scales its input and adds a share of the embedding to it.
        self.resid_scale = nn.Parameter(torch.ones(n_layer))
        self.embed_skip = nn.Parameter(torch.zeros(n_layer))
        if gpt.smear_channels:
            self.smear_gate = nn.Linear(gpt.smear_channels, 1, bias=False)
            self.smear_scale = nn.Parameter(torch.zeros(()))
        if gpt.backout:
            self.backout = nn.Parameter(torch.zeros(()))
        # Scales of the channels after the norms before each MLP and, in the last row, before the head.
        if gpt.norm_scales:
            self.norm_scale = nn.Parameter(torch.ones(n_layer + 1, n_embd))
        # The last layer sees all positions; before it S = a quarter of the context, L = all, tiled over the layers.
        context = gpt.sequence_len
        short = min(round_up(round_up(context, 4) // 4, 128), context)
        pattern = gpt.window_pattern
        self.windows = []
        for i in range(n_layer):
            is_short = pattern[i % len(pattern)] == "S" and i < n_layer - 1
            self.windows.append(short if is_short else context)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, inputs_embeds=None, **kwargs):
        """Give `generate` the whole sequence at each step, as there is no cache."""
        if inputs_embeds is None:
            return {"input_ids": input_ids, "attention_mask": attention_mask}
        # A prompt of embeddings stays as it is, and what is generated follows it; the mask covers both.
        n_new = attention_mask.size(1) - inputs_embeds.size(1)
        new_ids_BT = input_ids[:, input_ids.size(1) - n_new :]
        embeds_BTC = torch.cat((inputs_embeds, self.embed(new_ids_BT)), dim=1)
        return {"inputs_embeds": embeds_BTC, "attention_mask": attention_mask}

    def visibility(self, real_BT, positions_BT, documents_BT):
        """Return which positions each one may see, (B, T, T), and how far they are apart."""
        T = real_BT.size(1)
        distance_BTT = positions_BT[:, :, None] - positions_BT[:, None, :]
        # A token sees real tokens up to itself. Padding sees itself alone: a softmax over nothing would be NaN.
        causal_TT = torch.ones(T, T, dtype=torch.bool, device=real_BT.device).tril()
        itself_TT = torch.eye(T, dtype=torch.bool, device=real_BT.device)
        same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
        visible_BTT = (causal_TT & same_BTT & real_BT.bool()[:, None, :]) | itself_TT
        return visible_BTT, distance_BTT

    def rotation(self, positions_BT):
        """Return cos and sin of the rotary angles, computed in fp32, which tells far positions apart."""
        head_dim = self.gpt.n_embd // self.gpt.n_head
        channels = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32)
        frequencies = self.gpt.rope_base ** -(channels / head_dim)
        angles_BT1D = positions_BT[:, :, None, None].float() * frequencies
        return angles_BT1D.cos().to(self.dtype), angles_BT1D.sin().to(self.dtype)

    def tokens_of(self, embeds_BTC):
        """Return the token (B, T) of which each vector is the embedding, or -1 where it is that of none."""
        ids_BT = torch.full(embeds_BTC.shape[:2], -1, device=embeds_BTC.device)
        table_VC = self.embed.weight
        for ids_T, embeds_TC in zip(ids_BT, embeds_BTC, strict=True):
            # Few rows of the table have the same first channel: only those are compared whole.
            positions, tokens = (embeds_TC[:, :1] == table_VC[:, 0]).nonzero(as_tuple=True)
            same = (embeds_TC[positions] == table_VC[tokens]).all(-1)
            ids_T[positions[same]] = tokens[same]
        return ids_BT

    def value_embedding(self, i, ids_BT):
        """Return the value embeddings of layer i, zero where a vector is no token's (-1), or None if it has none."""
        if str(i) not in self.value_embeds:
            return None
        return self.value_embeds[str(i)](ids_BT.clamp(min=0)) * (ids_BT >= 0).unsqueeze(-1)

    def forward(
        self, input_ids=None, attention_mask=None, labels=None, inputs_embeds=None, position_ids=None, **kwargs
    ):
        """Return logits (B, T, V) in fp32, and the loss of predicting `labels` if given (-100 is ignored).

        `attention_mask` is 0 at padding, which generation puts on the left; positions count real tokens only.
        `position_ids` say otherwise; in a row without mask, each place where they do not go on by one begins another
        document, which sees nothing of those before it (transformers' DataCollatorWithFlattening packs such rows).
        `inputs_embeds` may stand in for `input_ids`. The loss is a mean, over `num_items_in_batch` tokens where
        transformers' Trainer says how many there are in all micro-batches of a step.
        """
        gpt = self.gpt
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids)
        elif input_ids is None:
            input_ids = self.tokens_of(inputs_embeds)
        real_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions_BT = (real_BT.cumsum(-1) - 1).clamp(min=0)
        documents_BT = torch.zeros_like(positions_BT)
        if position_ids is not None:
            positions_BT = position_ids.expand_as(positions_BT)
            if attention_mask is None:
                documents_BT[:, 1:] = (positions_BT.diff() != 1).cumsum(-1)
        visible_BTT, distance_BTT = self.visibility(real_BT, positions_BT, documents_BT)
        cos_BT1D, sin_BT1D = self.rotation(positions_BT)

        x_BTC = norm(inputs_embeds)
        if gpt.smear_channels:
            # Smear: each token gets a gated bit of the embedding of the token before it.
            goes_on_BT = real_BT[:, :-1] * (documents_BT.diff() == 0)
            previous_BTC = F.pad(x_BTC[:, :-1] * goes_on_BT[..., None], (0, 0, 1, 0))
            gate_BT1 = torch.sigmoid(self.smear_gate(x_BTC[..., : gpt.smear_channels]))
            x_BTC = x_BTC + self.smear_scale * gate_BT1 * previous_BTC
        x0_BTC = x_BTC
        middle_BTC = x_BTC
        norm_scales = self.norm_scale if gpt.norm_scales else [1.0] * (gpt.n_layer + 1)
        for i, block in enumerate(self.blocks):
            ve_BTC = self.value_embedding(i, input_ids)
            in_window_BTT = visible_BTT & (distance_BTT < self.windows[i])
            x_BTC = self.resid_scale[i] * x_BTC + self.embed_skip[i] * x0_BTC
            x_BTC = block(x_BTC, ve_BTC, norm_scales[i], cos_BT1D, sin_BT1D, in_window_BTT)
            if i == gpt.n_layer // 2:
                middle_BTC = x_BTC
        if gpt.backout:
            # Backout: early features that only later layers needed are subtracted before the head.
            x_BTC = x_BTC - self.backout * middle_BTC

        logits_BTV = self.head(norm(x_BTC) * norm_scales[-1])[..., : gpt.vocab_size].float()
        if gpt.softcap:  # logits stay between -softcap and softcap
            logits_BTV = gpt.softcap * torch.tanh(logits_BTV / gpt.softcap)
        loss = None
        if labels is not None:  # the logits at each position are those of the next token
            loss = self.loss_function(logits_BTV, labels, gpt.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits_BTV)
