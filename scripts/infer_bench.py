"""How fast the engine answers, alone and in batches: `python -m scripts.infer_bench`, which is dev/bench_infer.py."""

from nanochat import cli


def main() -> None:
    """Measure, print, and write a record."""
    from dev import bench_infer  # of a checkout: an installation has none

    bench_infer.main()


if __name__ == "__main__":
    cli.run(main)
