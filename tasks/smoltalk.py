"""General conversations from Parquet files in the shape of SmolTalk: a column `messages` of {role, content} lists."""

from pathlib import Path

from nanochat.common import get_base_dir
from nanochat.conversation import validate
from tasks.common import Conversation, Task, require_split


class SmolTalk(Task):
    """The conversations of `<tasks_dir>/smoltalk/<split>.parquet`; those that are not valid are left out.

    `tasks_dir` is `get_base_dir()/tasks` if not given. `skipped` counts what was left out. There is nothing to judge.
    """

    name = "smoltalk"

    def __init__(self, split: str, tasks_dir: Path | str | None = None, **slicing: int | None) -> None:
        import pyarrow
        import pyarrow.parquet as pq

        folder = Path(tasks_dir) if tasks_dir is not None else get_base_dir() / "tasks"
        path = folder / "smoltalk" / f"{require_split(split)}.parquet"
        if not path.is_file():
            raise ValueError(f"{path} is missing: put the SmolTalk files there, or name another folder of tasks")
        try:
            rows = pq.read_table(path, columns=["messages"])["messages"].to_pylist()
        except (pyarrow.ArrowException, KeyError) as error:
            raise ValueError(
                f"{path} is not a Parquet file with a column `messages` ({error}): get it again"
            ) from error
        self._conversations = []
        for messages in rows:
            conversation = {"messages": messages}
            try:
                validate(conversation)
            except ValueError:
                continue
            self._conversations.append(conversation)
        self.skipped = len(rows) - len(self._conversations)
        super().__init__(len(self._conversations), **slicing)

    def example(self, index: int) -> Conversation:
        return self._conversations[index]
