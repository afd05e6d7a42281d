"""Write report.md and its figures from the records of all stages: python -m scripts.report"""

from dataclasses import dataclass
from pathlib import Path

from nanochat import cli
from nanochat.common import get_base_dir
from nanochat.report import write_report


@dataclass(frozen=True)
class Config:
    """What the report says of cost, and where it goes."""

    price: float | None = cli.option(None, "dollars an hour of the machine, for the cost")
    out: str | None = cli.option(None, "folder to write to; unset: report/ in the base directory")

    def __post_init__(self) -> None:
        cli.require_positive(self, "price", zero=True)


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    base_dir = get_base_dir()
    folder = Path(config.out) if config.out else base_dir / "report"
    print(write_report(base_dir, folder, config.price))


if __name__ == "__main__":
    cli.run(main)
