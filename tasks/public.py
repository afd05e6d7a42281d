"""The published benchmarks, and a command that fetches every published data set that is scored or trained on:

python -m tasks.public
"""

from dataclasses import dataclass

from nanochat import cli
from nanochat.common import print0
from tasks.arc import ARCChallenge, ARCEasy
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mixtures import PUBLISHED
from tasks.mmlu import MMLU
from tasks.parquet import ParquetTask

# Each is scored on its split "test".
SCORED: dict[str, type[ParquetTask]] = {
    "arc_easy": ARCEasy,
    "arc_challenge": ARCChallenge,
    "mmlu": MMLU,
    "gsm8k": GSM8K,
    "humaneval": HumanEval,
}


@dataclass(frozen=True)
class Config:
    """No flags: HF_ENDPOINT names another hub, NANOCHAT_BASE_DIR where things are kept."""


def main() -> None:
    cli.parse(Config, description=__doc__)
    wanted: list[tuple[type[ParquetTask], str]] = [(task, "test") for task in SCORED.values()]
    for parts in PUBLISHED.values():
        wanted += [(task, split) for task, split, _ in parts]
    for task, split in dict.fromkeys(wanted):
        size = sum(path.stat().st_size for path in task.fetch(split))
        print0(f"{task.name} {split}: {size / 1e6:.1f} MB, licence {task.licence}")


if __name__ == "__main__":
    cli.run(main)
