"""Published data sets as tasks: rows of Parquet files, from a folder of yours or fetched once from the hub."""

import fcntl
import re
from pathlib import Path
from typing import Any

from nanochat.common import atomic_write_json, get_base_dir, read_json, sha256_file
from nanochat.conversation import validate
from nanochat.hub import fetch_dataset_files, hub_address, list_dataset
from tasks.common import Conversation, Task, name_skipped, require_split


class ParquetTask(Task):
    """The rows of one split as conversations. A subclass says where they are from and writes `conversation(row)`.

    They are read from `<tasks_dir>/<name>/<split>.parquet`; without `tasks_dir` from get_base_dir()/tasks, fetched
    into it if need be. Rows that make no valid conversation are named, counted in `skipped` and left out.
    """

    repo, config, licence = "", "", ""  # of the hub's data set; its files are <config>/<split>-*.parquet
    splits: tuple[str, ...] = ("train", "test")
    columns: tuple[str, ...] = ()

    def __init__(self, split: str, tasks_dir: Path | str | None = None) -> None:
        require_split(split, self.splits)
        self._table = _read(self.local(split, tasks_dir) or fetch(type(self), split, tasks_dir), self.columns)
        where = f"{_folder(self.name, tasks_dir) / split}.parquet"
        self._rows, problems = [], []
        for i in range(self._table.num_rows):
            try:
                validate(self._read_row(i))
                self._rows.append(i)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                problems.append(f"{where}, row {i}: {error}")
        self.skipped = name_skipped(where, problems, self._table.num_rows)
        super().__init__(len(self._rows))

    @classmethod
    def local(cls, split: str, tasks_dir: Path | str | None = None) -> list[Path]:
        """The files of a split that are on this machine; none while a download is not complete.

        Raises ValueError when a downloaded file is not what its manifest says.
        """
        folder = _folder(cls.name, tasks_dir)
        manifest = folder / f"{split}.manifest.json"
        if not manifest.exists():
            path = folder / f"{split}.parquet"
            return [path] if path.is_file() else []
        entries = {folder / entry["file"]: entry for entry in read_json(manifest)["files"]}
        for path, entry in entries.items():
            if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256_file(path) != entry["sha256"]:
                raise ValueError(f"{path} is not the file that was downloaded: delete {folder} and run again")
        return list(entries)

    def example(self, index: int) -> Conversation:
        return self._read_row(self._rows[index])

    def _read_row(self, i: int) -> Conversation:
        row = self._table.slice(i, 1).to_pylist()[0]
        if missing := [name for name in self.columns if row[name] in (None, "")]:
            raise ValueError(f"no {' and no '.join(missing)}")
        return self.conversation(row)

    def conversation(self, row: dict[str, Any]) -> Conversation:
        """The conversation of a row whose columns are all filled; raises ValueError when it makes none."""
        raise NotImplementedError


class ChoiceTask(ParquetTask):
    """Questions with lettered choices; the answer is the letter alone."""

    eval_type = "categorical"
    baseline = 0.25


def _folder(name: str, tasks_dir: Path | str | None) -> Path:
    return (Path(tasks_dir) if tasks_dir is not None else get_base_dir() / "tasks") / name


def _read(paths: list[Path], columns: tuple[str, ...]) -> Any:
    """The files' rows as one Arrow table of `columns`."""
    import pyarrow as pa
    from pyarrow import parquet

    tables = []
    for path in paths:
        try:
            tables.append(parquet.ParquetFile(path).read(columns=list(columns)).select(columns))
        except (pa.ArrowException, OSError, KeyError) as error:
            wanted = " and ".join(columns)
            raise ValueError(f"{path} is not a Parquet file with {wanted} ({error}): get it again") from error
    return pa.concat_tables(tables)


def fetch(task: type[ParquetTask], split: str, tasks_dir: Path | str | None = None) -> list[Path]:
    """Return the files of a split, downloaded by the first process that asks; the others wait for it.

    The manifest is written last: without it, files count as not there. Raises ValueError if they cannot be downloaded,
    or are missing from `tasks_dir`, into which nothing is downloaded.
    """
    folder = _folder(task.name, tasks_dir)
    if tasks_dir is not None:
        raise ValueError(f"{folder / split}.parquet is missing: put it there, or leave out --tasks-dir to fetch it")
    pattern = re.compile(rf"{re.escape(task.config)}/{split}-\d+-of-(\d+)\.parquet")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{split}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found := task.local(split):
            return found
        try:
            commit, listing = list_dataset(task.repo)
            matches = [match for path in sorted(listing) if (match := pattern.fullmatch(path))]
            files = [listing[match[0]] for match in matches]
            if not matches or len(files) != int(matches[0][1]):  # each file's name says how many there are
                raise ValueError(f"{task.repo} lists {len(files)} files {pattern.pattern}")
            fetch_dataset_files(task.repo, commit, files, folder)
        except (ConnectionError, ValueError) as error:
            raise ValueError(
                f"{folder / split}.parquet is missing: connect, or set HF_ENDPOINT to a mirror, or name a folder that "
                f"holds {task.name}/{split}.parquet by --tasks-dir ({error})"
            ) from error
        manifest = {
            "source": f"{hub_address()}/datasets/{task.repo}",
            "licence": task.licence,
            "files": [{"file": file.path, "bytes": file.bytes, "sha256": file.sha256} for file in files],
        }
        atomic_write_json(folder / f"{split}.manifest.json", manifest)
    return [folder / file.path for file in files]
