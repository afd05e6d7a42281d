"""Training on conversations, for midtraining and fine-tuning: render, pack into rows, and hand over to `train`.

A stage starts from the model of the stage before it. Its rows hold conversations, of which only the assistant's own
tokens are supervised, and replayed pretraining text, without which a small model forgets what it has read.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from nanochat import checkpoint, recipe
from nanochat.cli import option, require_positive
from nanochat.common import print0
from nanochat.compute import Compute
from nanochat.conversation import Rendered, render
from nanochat.documents import iterate_documents, list_shards
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.recipe import TrainConfig
from nanochat.run import Run, agreed_kernels
from nanochat.token_shards import PackedRows, data_hash, pack_masked
from nanochat.tokenizer import Tokenizer
from nanochat.trainer import rows_per_step, train


class Conversations(Protocol):
    """Conversations by index: a list of them, or a `tasks.common.Task`, which makes each when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class SourceConfig(TrainConfig):
    """Flags of a stage that goes on from a trained model."""

    source_tag: str | None = option(None, "tag of the model to start from; unset = the newest")
    source_step: int | None = option(None, "its step; unset = the newest")
    init_lr_frac: float = option(1.0, "factor on all learning rates")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "init_lr_frac", zero=True)


@dataclass(frozen=True)
class FinetuneConfig(SourceConfig):
    """Flags of a stage that learns from conversations."""

    num_epochs: int = option(1, "passes over the conversations, when --num-iterations is unset")
    replay: float = option(0.5, "tokens of pretraining text for each token of conversation, against forgetting")
    tasks_dir: str | None = option(None, "folder of published data sets to mix in; unset: the downloaded ones")
    custom_json: str | None = option(None, "your own conversations to mix in, one JSON value a line")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_epochs")
        require_positive(self, "replay", zero=True)


@dataclass(frozen=True)
class Source:
    """A trained model that a stage goes on from."""

    model: GPT
    tokenizer: Tokenizer
    meta: dict[str, Any]  # of its checkpoint
    name: str  # such as "base/d12 step 1680 5f1c..." with the first digits of the weights' hash


def finetune(
    config: FinetuneConfig, stage: str, from_stage: str, train_on: Conversations, val_on: Conversations
) -> None:
    """Train the newest `from_stage` model on conversations and save it as `stage`.

    The loss counts assistant tokens only. Batch size and steps default to the source run's batch and to one pass over
    the conversations. Raises ValueError when there is no source model, or no usable conversation.
    """
    compute = Compute.create(config.device_type)
    source = load_source(from_stage, stage, config, compute)
    tokenizer = source.tokenizer
    T = source.model.config.sequence_len

    train_rows = conversation_rows(
        f"{stage}_train", train_on, tokenizer, T, compute, replay=config.replay, dataset=source.meta["dataset"]
    )
    val_rows = conversation_rows(f"{stage}_val", val_on, tokenizer, T, compute)

    # The batch of pretraining, and as many steps as there are rows.
    total_batch_size = config.total_batch_size or source.meta["total_batch_size"]
    rows_in_step = rows_per_step(total_batch_size, T, compute.world_size)
    rows_in_epoch = train_rows.total()
    num_iterations = config.num_iterations or max(1, config.num_epochs * rows_in_epoch // rows_in_step)
    print0(
        f"{stage} from {source.name}: {len(train_on):,} conversations in {rows_in_epoch:,} rows of {T}; "
        f"{num_iterations} steps of {total_batch_size:,} tokens"
    )
    facts = {"data_hash": data_hash(train_rows, val_rows)}
    run = continue_from(source, stage, config, compute, total_batch_size, num_iterations, more_facts=facts)
    train(run, train_rows, val_rows)
    compute.close()


def load_source(stage: str, into: str, config: SourceConfig, compute: Compute) -> Source:
    """Load the model of `stage` that stage `into` goes on from. Raises ValueError, with the remedy, for none."""
    tag = config.source_tag or checkpoint.find_tag(stage)
    kernels = None
    if meta := checkpoint.peek_meta(stage, tag, config.source_step):
        model_config = GPTConfig.from_dict(meta["model_config"])
        kernels = agreed_kernels(into, config.model_tag or tag, config, model_config, compute)
    model, tokenizer, meta = checkpoint.load_model(
        stage, compute.device, tag=tag, step=config.source_step, train=True, kernels=kernels
    )
    digest = meta["files"]["model.safetensors"][:12]
    return Source(model, tokenizer, meta, name=f"{stage}/{meta['tag']} step {meta['step']} {digest}")


def continue_from(
    source: Source,
    stage: str,
    config: SourceConfig,
    compute: Compute,
    total_batch_size: int,
    num_iterations: int,
    more_facts: dict[str, Any],
) -> Run:
    """Return a run that trains the source further as `stage`, with a new optimizer. more_facts: see `Run.facts`."""
    scales = recipe.learning_rate_scales(total_batch_size, config.init_lr_frac)
    # Nothing decays unless it is asked for: decay would pull the weights away from what they know.
    weight_decay = config.weight_decay or 0.0
    fused = config.compile and compute.device.type == "cuda"
    optimizer = MuonAdamW(source.model, config.learning_rates(scales), weight_decay, compute, compiled=fused)
    return Run(
        stage=stage,
        tag=config.model_tag or source.meta["tag"],
        config=config,
        model=source.model,
        optimizer=optimizer,
        tokenizer=source.tokenizer,
        compute=compute,
        total_batch_size=total_batch_size,
        num_iterations=num_iterations,
        facts={
            "dataset": source.meta["dataset"],
            "depth": source.meta["depth"],
            "source": source.name,
            **more_facts,
        },
    )


# --- from conversations to rows


def conversation_rows(
    name: str,
    conversations: Conversations,
    tokenizer: Tokenizer,
    T: int,
    compute: Compute,
    replay: float = 0.0,
    dataset: str = "",
) -> PackedRows:
    """Let rank 0 render conversations and pack them into rows of T + 1 tokens; every rank then reads these rows.

    replay: tokens of `dataset`'s training text to mix in, for each token of conversation.
    """

    def stream() -> Iterator[Rendered]:
        n_tokens = 0
        for ids, mask in render_all(conversations, tokenizer, max_tokens=T + 1):
            n_tokens += len(ids)
            yield ids, mask
        if replay:
            yield from replayed(dataset, tokenizer, max_tokens=T + 1, n_tokens=round(replay * n_tokens))

    return compute.from_rank_0(lambda: pack_masked(name, stream(), tokenizer, T))


def render_all(conversations: Conversations, tokenizer: Tokenizer, max_tokens: int) -> Iterator[Rendered]:
    """Yield conversations as (ids, mask), skipping those that are malformed or supervise nothing once truncated."""
    problems: Counter[str] = Counter()
    began = time.monotonic()
    for index in range(len(conversations)):
        try:
            ids, mask = render(conversations[index], tokenizer, max_tokens)
            if not any(mask):
                raise ValueError("nothing to learn within the context")
            yield ids, mask
        except ValueError as error:
            problems[str(error)] += 1
        if (index + 1) % 50_000 == 0:
            print0(f"rendered {index + 1:,} of {len(conversations):,}, {time.monotonic() - began:.0f} s")
    if problems:
        [(problem, count)] = problems.most_common(1)
        print0(f"skipped {problems.total()} of {len(conversations):,} conversations ({count} of them: {problem})")


def replayed(dataset: str, tokenizer: Tokenizer, max_tokens: int, n_tokens: int) -> Iterator[Rendered]:
    """Yield about `n_tokens` tokens of the dataset's training text as (ids, mask), supervised throughout.

    It is taken from the last shard backwards: a run that does not use up its dataset has not seen the end of it.
    """
    for path in reversed(list_shards(dataset, "train")):
        for text in iterate_documents([path]):
            if n_tokens <= 0:
                return
            ids = tokenizer.encode(text, prepend="<|bos|>")[:max_tokens]
            n_tokens -= len(ids)
            yield ids, [0] + [1] * (len(ids) - 1)
