"""MMLU: exam questions of 57 subjects, with four choices (arXiv:2009.03300).

This is the shortest benchmark, and the one to copy for another data set of the hub: say where its rows are, and make a
row a conversation. `ChoiceTask` judges a completion by its letter.
"""

from typing import Any

from tasks.common import Conversation, multiple_choice
from tasks.parquet import ChoiceTask


class MMLU(ChoiceTask):
    """A question of the "test" split, or of those to train on: "auxiliary_train" (other exams) and "dev"."""

    name = "mmlu"
    repo = "cais/mmlu"
    config = "all"
    licence = "MIT"
    splits = ("auxiliary_train", "dev", "validation", "test")
    columns = ("question", "choices", "answer")

    def conversation(self, row: dict[str, Any]) -> Conversation:
        return multiple_choice(row["question"], row["choices"], row["answer"])
