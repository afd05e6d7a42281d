"""Chat tasks and ChatCORE of a checkpoint: python -m scripts.chat_eval --stage sft

Prints a line per task and writes evals/chat_eval_<stage>_<tag>.json, which the report reads.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import cli
from nanochat.chat_eval import Sampling, chat_core, evaluate_task
from nanochat.checkpoint import load_model
from nanochat.common import STAGES, get_base_dir, print0, write_record
from nanochat.compute import Compute
from nanochat.engine import Engine
from tasks import builtin, public
from tasks.common import Task


@dataclass(frozen=True)
class Config:
    """Which checkpoint is asked what."""

    stage: str = cli.option("sft", "stage of the checkpoint", choices=STAGES)
    tasks: str | None = cli.option(None, "tasks, separated by commas; unset: the built-in, and what --tasks-dir holds")
    tasks_dir: str | None = cli.option(None, "folder of published tasks; unset: downloads, made where needed")
    max_problems: int | None = cli.option(None, "problems of each task; unset: all")
    batch_size: int = cli.option(32, "problems at a time")
    max_new_tokens: int = cli.option(128, "longest answer, in tokens")
    temperature: float = cli.option(0.0, "of sampling; 0: the likeliest token")
    top_k: int | None = cli.option(None, "sample among so many tokens; unset: all")
    num_samples: int = cli.option(1, "answers to each problem of the generative tasks")
    pass_k: int | None = cli.option(None, "report pass@K also, estimated from --num-samples")
    seed: int = cli.option(42, "seed of sampling")
    unsafe: bool = cli.option(False, "run model-written code even where this machine cannot isolate it")
    model_tag: str | None = cli.option(None, "model; unset: the newest")
    step: int | None = cli.option(None, "step of the checkpoint; unset: the last")
    device_type: str | None = cli.option(None, "cuda, mps or cpu; unset: the best there is")

    def __post_init__(self) -> None:
        cli.require_positive(self, "max_problems", "batch_size", "max_new_tokens", "num_samples", "top_k", "pass_k")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature}: must be 0 or more")
        if self.num_samples > 1 and not self.temperature:
            raise ValueError("--num-samples: all would be alike; give --temperature above 0, such as .8")
        if self.pass_k is not None and self.pass_k > self.num_samples:
            raise ValueError(f"--pass-k {self.pass_k}: needs --num-samples {self.pass_k} or more")
        known = [*builtin.SCORED, *public.SCORED]
        unknown = [] if self.tasks is None else [name for name in self.tasks.split(",") if name not in known]
        if unknown:
            raise ValueError(f"--tasks: no task {', '.join(unknown)}; choose from {', '.join(known)}")

    @property
    def task_names(self) -> list[str]:
        """The tasks asked for, or all that this machine has. Raises ValueError when --tasks-dir is not there."""
        if self.tasks is not None:
            return list(dict.fromkeys(self.tasks.split(",")))
        if self.tasks_dir is not None and not Path(self.tasks_dir).is_dir():
            raise ValueError(f"--tasks-dir {self.tasks_dir}: no such folder")
        there = [name for name, task in public.SCORED.items() if task.local("test", self.tasks_dir)]
        return [*builtin.SCORED, *there]

    def task(self, name: str) -> Task:
        """Return a task with its problems. Raises ValueError or OSError when it cannot be read or has none."""
        if name in builtin.SCORED:
            return builtin.SCORED[name]("test")
        options = {"unsafe": self.unsafe} if name == "humaneval" else {}
        task = public.SCORED[name]("test", self.tasks_dir, **options)
        if not len(task):
            raise ValueError(f"{name} has no problems")
        return task


def print_scores(name: str, record: dict[str, Any]) -> None:
    accuracy = f"{100 * record['accuracy']:.1f} ± {100 * record['stderr']:.1f} %"
    print0(f"{name:13} {accuracy:>16} {record['n']:6} {record['baseline']:7.2f} {record['centered']:8.3f}")
    for k, rate in record.get("pass_at_k", {}).items():
        print0(f"{f'  pass@{k}':13} {100 * rate['accuracy']:9.1f} ± {100 * rate['stderr']:.1f} %")


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    names = config.task_names
    compute = Compute.create(config.device_type)
    model, tokenizer, meta = load_model(config.stage, compute.device, config.model_tag, config.step)
    engine = Engine(model, tokenizer, max_batch=config.batch_size)
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        num_samples=config.num_samples,
        pass_k=config.pass_k or 1,
        seed=config.seed,
    )
    print0(f"{config.stage} {meta['tag']} step {meta['step']}")
    print0(f"{'task':13} {'accuracy':>16} {'n':>6} {'chance':>7} {'centred':>8}")
    records: dict[str, dict[str, Any]] = {}
    samples: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for name in names:
        task = None
        problem = "another process could not read it"
        try:
            task = config.task(name)
        except (ValueError, OSError) as error:
            problem = str(error)
        if compute.any_rank(task is None):  # all ranks score a task together, or none does
            skipped[name] = problem
            print0(f"{name} skipped: {problem}")
            continue
        record = evaluate_task(
            task,
            model,
            tokenizer,
            engine,
            max_problems=config.max_problems,
            batch_size=config.batch_size,
            sampling=sampling,
            compute=compute,
        )
        samples += [{"task": name, **sample} for sample in record.pop("samples")]
        records[name] = record
        print_scores(name, record)
    if not records:
        raise ValueError(f"no task could run: {'; '.join(skipped.values())}")
    core = chat_core(records)
    print0(f"ChatCORE {core['chatcore']:.4f} ± {core['chatcore_stderr']:.4f} ({', '.join(core['chatcore_tasks'])})")
    if compute.rank == 0:
        record = {
            "stage": config.stage,
            "tag": meta["tag"],
            "step": meta["step"],
            **core,
            "tasks": records,
            "skipped": skipped,
            "samples": samples,
        }
        path = get_base_dir() / "evals" / f"chat_eval_{config.stage}_{meta['tag']}.json"
        write_record(path, record)
        print0(f"written: {path}")
    compute.close()


if __name__ == "__main__":
    cli.run(main)
