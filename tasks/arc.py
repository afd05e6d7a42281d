"""ARC: grade-school science questions with three to five choices (arXiv:1803.05457)."""

from typing import Any

from tasks.common import Conversation, multiple_choice
from tasks.parquet import ChoiceTask


class ARCEasy(ChoiceTask):
    """The questions that retrieval or word co-occurrence answers."""

    name = "arc_easy"
    repo = "allenai/ai2_arc"
    config = "ARC-Easy"
    licence = "CC BY-SA 4.0"
    splits = ("train", "validation", "test")
    columns = ("question", "choices", "answerKey")

    def conversation(self, row: dict[str, Any]) -> Conversation:
        choices = row["choices"]["text"]
        labels = row["choices"]["label"]  # letters or digits; chats show A, B, ... in either case
        key = row["answerKey"]
        if len(labels) != len(choices) or labels.count(key) != 1:
            raise ValueError(f"the answer {key!r} is not one of the labels {labels} of {len(choices)} choices")
        return multiple_choice(row["question"], choices, labels.index(key))


class ARCChallenge(ARCEasy):
    """The questions that neither of the two answers."""

    name = "arc_challenge"
    config = "ARC-Challenge"
