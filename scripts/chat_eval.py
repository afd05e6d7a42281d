"""Chat tasks and ChatCORE of a checkpoint: python -m scripts.chat_eval --stage sft"""

from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from nanochat import cli
from nanochat.chat_eval import chat_core, evaluate_task
from nanochat.checkpoint import load_model
from nanochat.common import get_base_dir, print0, write_record
from nanochat.compute import Compute
from nanochat.engine import Engine
from tasks.builtin import SCORED as TASKS


@dataclass(frozen=True)
class Config:
    """Which checkpoint is asked what."""

    stage: str = cli.option("sft", "stage of the checkpoint", choices=("base", "mid", "sft", "rl"))
    tasks: str = cli.option(",".join(TASKS), "tasks to run, separated by commas")
    max_problems: int | None = cli.option(None, "problems of each task; unset: all")
    batch_size: int = cli.option(32, "problems at a time")
    max_new_tokens: int = cli.option(128, "longest answer, in tokens")
    model_tag: str | None = cli.option(None, "model; unset: the newest")
    step: int | None = cli.option(None, "step of the checkpoint; unset: the last")
    device_type: str | None = cli.option(None, "cuda, mps or cpu; unset: the best there is")

    def __post_init__(self) -> None:
        for name in ("max_problems", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if unknown := [name for name in self.task_names if name not in TASKS]:
            raise ValueError(f"--tasks: no task {', '.join(unknown)}; choose from {', '.join(TASKS)}")

    @property
    def task_names(self) -> list[str]:
        return self.tasks.split(",")


def main() -> None:
    """Evaluate the tasks, print a table, write evals/chat_eval_<stage>_<tag>.json."""
    config = cli.parse(Config, description=__doc__)
    compute = Compute.create(config.device_type)
    model, tokenizer, meta = load_model(config.stage, compute.device, config.model_tag, config.step)
    engine = Engine(model, tokenizer, max_batch=config.batch_size)
    print0(f"{config.stage} {meta['tag']} step {meta['step']}")
    print0(f"{'task':12} {'accuracy':>16} {'n':>6} {'chance':>7} {'centred':>8}")
    records, samples = {}, []
    for name in config.task_names:
        record = evaluate_task(
            TASKS[name]("test"),
            model,
            tokenizer,
            engine,
            max_problems=config.max_problems,
            batch_size=config.batch_size,
            max_new_tokens=config.max_new_tokens,
            compute=compute,
            progress=partial(tqdm, desc=name, leave=False, disable=None if compute.rank == 0 else True),
        )
        samples += [{"task": name, **sample} for sample in record.pop("samples")]
        records[name] = record
        accuracy = f"{100 * record['accuracy']:.1f} ± {100 * record['stderr']:.1f} %"
        print0(f"{name:12} {accuracy:>16} {record['n']:6} {record['baseline']:7.2f} {record['centered']:8.3f}")
    chatcore = chat_core(records.values())
    print0(f"ChatCORE {chatcore:.4f}")
    if compute.rank == 0:
        identity = {"stage": config.stage, "tag": meta["tag"], "step": meta["step"]}
        path = get_base_dir() / "evals" / f"chat_eval_{config.stage}_{meta['tag']}.json"
        write_record(path, {**identity, "chatcore": chatcore, "tasks": records, "samples": samples})
        print0(f"written: {path}")
    compute.close()


if __name__ == "__main__":
    cli.run(main)
