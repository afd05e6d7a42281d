"""Write the report from the records of all stages: `python -m scripts.report`."""

from nanochat.cli import run
from nanochat.report import main

if __name__ == "__main__":
    run(main)
