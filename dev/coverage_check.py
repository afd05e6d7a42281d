"""Did the tests run the code? 90 % of the lines of nanochat/, and something of every public function: reads what
`coverage json` has written (dev/test.sh)."""

import sys
from pathlib import Path
from typing import Any

from dev.bench_old import markdown_table
from nanochat import cli
from nanochat.common import read_json

LEAST = 90.0  # percent of lines
# what needs a GPU or Triton, which PyTorch for CPUs comes without, and the plain form beside it; tests run it in
# Triton's interpreter where there is one, `python -m dev.gpu_check` on a GPU
ON_GPU = {
    "kernels.softcap_cross_entropy_",
    "kernels.fused_mlp",
    "kernels.eager_mlp",
    "kernels.milliseconds",
    "mxfp4.matvec",
}
# what runs in processes that may write nothing, nor say what they ran; tests/test_execution.py sees what it does
CONFINED = {"execution_child"}


def never_run(files: dict[str, Any]) -> list[str]:
    """Public functions and methods of which no line ran, as module.Class.name; without those inside of functions."""
    missed = []
    for path, report in files.items():
        functions = {name: function for name, function in report["functions"].items() if name}
        for name, function in functions.items():
            own = any(part.startswith("_") for part in name.split(".")) or name.rpartition(".")[0] in functions
            idle = function["summary"]["num_statements"] and not function["executed_lines"]
            if idle and not own and Path(path).stem not in CONFINED:
                missed.append(f"{Path(path).stem}.{name}")
    return sorted(set(missed) - ON_GPU)


def main() -> None:
    if len(sys.argv) != 2:
        raise ValueError("give the file that `coverage json -o FILE` wrote")
    report = read_json(Path(sys.argv[1]))
    rows = [
        {"file": path, "lines, %": of["summary"]["percent_covered"], "not run": len(of["missing_lines"])}
        for path, of in sorted(report["files"].items(), key=lambda item: item[1]["summary"]["percent_covered"])
    ]
    print(markdown_table(rows[:20]))
    percent, missed = report["totals"]["percent_covered"], never_run(report["files"])
    print(f"{percent:.1f} % of {report['totals']['num_statements']:,} lines of nanochat/ were run")
    if percent < LEAST:
        raise ValueError(f"the tests run {percent:.1f} % of the lines, less than {LEAST:g}: test what the table shows")
    if missed:
        raise ValueError(f"no test runs {', '.join(missed)}: test it, or delete it")


if __name__ == "__main__":
    cli.run(main)
