"""What the open-weights families share: checked reading of config.json, and the base class of their models.

Each family is a file, as in mlx-lm: its config, its modules, and how the tensors in its files are named. A family gives
`hidden`, from tokens to the last norm; `OpenModel.forward` makes logits or a loss of that. Modules have the names that
they have in the files, so that most weights find their place without a table. At the top these are, in every family:

    embed_tokens     tokens in; the first device, where layers are spread over several
    layers           blocks, each with all of its weights on one device
    norm, lm_head    the last norm and the head; where the head is the embedding, `lm_head.weight` is its weight, too

Shapes as in gpt.py: B sequences, T positions, C channels, H query heads, K kv heads, D head dim, V vocabulary.
"""

from typing import Annotated, Any

import torch
import torch.nn as nn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Self

from nanochat import attention
from nanochat.language_model import LanguageModel, LayerNeed, Linear, WholeRows
from nanochat.loss import softcap_cross_entropy

# The ranges keep a hostile config.json from asking for tensors whose size overflows.
Count = Annotated[int, Field(ge=1, le=1 << 28)]
Layers = Annotated[int, Field(ge=1, le=1000)]
Heads = Annotated[int, Field(ge=1, le=1 << 16)]
Positive = Annotated[float, Field(gt=0, lt=1e30)]


class OpenConfig(BaseModel):
    """A config.json, checked. A subclass is a table of its values, with our names and theirs:

        n_layer: Layers = Field(alias="num_hidden_layers")   # required, from 1 to 1000
        mlp_bias: bool = False                               # optional
        hidden_act: Literal["silu"] = "silu"                 # other values mean other maths, and are refused

    What is not in the table is ignored.
    """

    model_config = ConfigDict(strict=True)  # "64" is no number, and 1 is not true

    @classmethod
    def from_json(cls, values: Any, where: str = "config.json") -> Self:
        """Make a config of what was read from a file called `where`; null counts as absent.

        Raises ValueError that names the first value that is missing, of another kind or out of range.
        """
        try:
            return cls.model_validate(without_nulls(values))
        except ValidationError as error:
            problem = error.errors()[0]
            path = [where, *(str(part) for part in problem["loc"])]  # such as config.json, rope_parameters, factor
            reason = problem["msg"].removeprefix("Value error, ")  # pydantic puts this before our own words
            given = problem["input"]
            if not isinstance(given, dict):
                reason += f" (it is {given!r:.40})"
            raise ValueError(f"{': '.join(path)}: {reason}") from error


def without_nulls(values: Any) -> Any:
    """Return a JSON value without the names whose value is null, in it or in objects within it."""
    if not isinstance(values, dict):
        return values
    return {name: without_nulls(value) for name, value in values.items() if value is not None}


def attend_whole(
    q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int, sinks_H: torch.Tensor | None = None
) -> torch.Tensor:
    """Attend in rows that are read whole: by the plain kernel of the device, or with sinks by the definition."""
    if sinks_H is None:
        return attention.attend(q_BTHD, k_BTKD, v_BTKD, window)
    return attention.attend_naive(q_BTHD, k_BTKD, v_BTKD, window, sinks_H)


def bring(device: torch.device, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return `tensors`, which lie together, on the device of the next layer."""
    if tensors[0].device == device:  # `.to` would do nothing, but each call would be an operation in cpu_trace.py
        return tensors
    return tuple(tensor.to(device) for tensor in tensors)


class OpenModel(LanguageModel):
    """A model of any family. It holds no values until `hf/load.py` fills it."""

    config_type: Any  # its `from_json` reads config.json
    embed_tokens: nn.Embedding
    layers: Any
    norm: Any
    lm_head: Linear
    readout: Any  # Together((lm_head,)): the head as a product that prepacking may replace (packed.py)

    @staticmethod
    def rename(name: str) -> str | None:
        """Return the model's name of a tensor in a file; None = not needed."""
        raise NotImplementedError

    @staticmethod
    def is_transposed(name: str) -> bool:
        """Return whether files hold the matrix of this name, the model's, as (inputs, outputs)."""
        return False

    def hidden(self, idx: torch.Tensor, context: Any) -> torch.Tensor:
        """Return the normed residual that the head reads, (..., C), of tokens (B, T) or (N) in their context."""
        raise NotImplementedError

    def tie_head(self) -> None:
        """Let the head use the embedding's weight, if config.json says that the two are tied."""
        if self.config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def layer_of(self, name: str) -> int:
        """Return the layer beside which a parameter belongs when layers are spread over devices.

        Tokens come in at the first layer and leave after the last. A tied head pulls the norm back to the first, where
        the embedding is.
        """
        if name.startswith("layers."):
            return int(name.split(".")[1])
        is_output = name.startswith(("norm.", "lm_head."))
        return self.config.n_layer - 1 if is_output and not self.config.tied else 0

    @property
    def cache_needs(self) -> list[LayerNeed]:
        """Return what each layer keeps of a token in the KV cache."""
        config = self.config
        return [LayerNeed(config.n_kv_head, config.head_dim, window) for window in config.windows]

    @property
    def device(self) -> torch.device:
        """The device where tokens come in."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return self.embed_tokens.weight.dtype

    @property
    def whole(self) -> bool:
        """Return whether all weights are plain tensors on one device; not so after `hf/parallel.py`."""
        return len({(type(p), p.device) for p in self.parameters()}) == 1

    @property
    def graphs(self) -> bool:
        """Return whether decoding may be replayed as a CUDA graph."""
        return self.whole

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        loss_reduction: str = "mean",
        context: Any = None,
        wanted_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return logits in fp32, or with targets the loss in nats; the arguments are those of `gpt.GPT.forward`."""
        x_C = self.hidden(idx, context or WholeRows(idx, attend_whole, self.config.sequence_len))
        if targets is not None:
            # The loss never makes all logits at once, and has no softcap here (0).
            return softcap_cross_entropy(x_C, self.lm_head.weight, targets, 0.0, loss_reduction)
        if wanted_R is not None:
            # Of a prompt, only the last token's logits are wanted: the head is the largest matrix.
            x_C = x_C[wanted_R.to(x_C.device)]
        (logits_V,) = self.readout(x_C)
        return logits_V.float()
