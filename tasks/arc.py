"""ARC: grade-school science questions with three to five choices (arXiv:1803.05457)."""

from typing import Any

from tasks.common import Conversation, multiple_choice
from tasks.parquet import ChoiceTask


class ARCEasy(ChoiceTask):
    """The questions that retrieval or word co-occurrence answers. Labels are letters or digits; A, B, ... are shown."""

    name = "arc_easy"
    repo, config, licence = "allenai/ai2_arc", "ARC-Easy", "CC BY-SA 4.0"
    splits = ("train", "validation", "test")
    columns = ("question", "choices", "answerKey")

    def conversation(self, row: dict[str, Any]) -> Conversation:
        texts, labels, key = row["choices"]["text"], row["choices"]["label"], row["answerKey"]
        if len(labels) != len(texts) or labels.count(key) != 1:
            raise ValueError(f"the answer {key!r} is not one of the labels {labels} of {len(texts)} choices")
        return multiple_choice(row["question"], texts, labels.index(key))


class ARCChallenge(ARCEasy):
    """The questions that neither of the two answers."""

    name = "arc_challenge"
    config = "ARC-Challenge"
