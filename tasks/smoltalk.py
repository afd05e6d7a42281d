"""General conversations in the shape of SmolTalk: a column `messages` of {role, content} lists (arXiv:2502.02737)."""

from typing import Any

from tasks.common import Conversation
from tasks.parquet import ParquetTask


class SmolTalk(ParquetTask):
    """Conversations to learn from, SmolTalk's selection for small models; there is nothing to judge."""

    name = "smoltalk"
    repo = "HuggingFaceTB/smol-smoltalk"
    config = "data"
    licence = "Apache-2.0"
    columns = ("messages",)

    def conversation(self, row: dict[str, Any]) -> Conversation:
        return {"messages": row["messages"]}
