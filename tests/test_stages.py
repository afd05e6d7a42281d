"""The stages one after the other on a tiny world: what each leaves behind, and that the next one reads it."""

import json

from tiny_run import SKILLS, STEPS, metrics, run


def read(path):
    return json.loads(path.read_text())


def test_three(trained_world):
    run("scripts.chat_sft", *STEPS, *SKILLS, "--num-iterations", "4")
    print(metrics("sft", "d2"))
