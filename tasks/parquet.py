"""Published data sets as tasks: rows of Parquet files, from a folder of yours or fetched once from the hub.

    MMLU("test")                        fetched into NANOCHAT_BASE_DIR/tasks/mmlu, if it is not there yet
    MMLU("test", tasks_dir="mine")      mine/mmlu/test.parquet, which has to be there

A download keeps the hub's file names and writes `<split>.manifest.json` last, with the hash of every file. Without this
manifest the files count as not there, so that a download that was cut off is continued and never read.
"""

import re
from pathlib import Path
from typing import Any

from nanochat.common import atomic_write_json, get_base_dir, read_json, sha256_file
from nanochat.conversation import validate
from nanochat.hub import fetch_dataset_files, hub_address, list_dataset
from tasks.common import Conversation, Task, name_skipped, require_split


class ParquetTask(Task):
    """The rows of one split as conversations. A subclass says where they are from and writes `conversation(row)`.

    Every row is tried when the task is made. Rows that give no valid conversation are named, counted in `skipped` and
    left out. Raises ValueError if the files are missing and cannot be fetched, or are not what they should be.
    """

    repo = ""  # the data set's name on the hub
    config = ""  # its folder there: the files are <config>/<split>-*.parquet
    licence = ""
    splits: tuple[str, ...] = ("train", "test")
    columns: tuple[str, ...] = ()

    def __init__(self, split: str, tasks_dir: Path | str | None = None) -> None:
        require_split(split, self.splits)
        where = self.folder(tasks_dir) / f"{split}.parquet"
        paths = self.local(split, tasks_dir)
        if not paths and tasks_dir is not None:
            raise ValueError(f"{where} is missing: put it there, or leave out --tasks-dir to fetch it")
        self.table = self._read(paths or self.fetch(split))
        self.rows = []
        problems = []
        for number in range(self.table.num_rows):
            try:
                validate(self._conversation_of(number))
                self.rows.append(number)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                problems.append(f"{where}, row {number}: {error}")
        self.skipped = name_skipped(str(where), problems, self.table.num_rows)
        super().__init__(len(self.rows))

    def conversation(self, row: dict[str, Any]) -> Conversation:
        """Return the conversation of a row whose `columns` are all filled. Raises ValueError if it makes none."""
        raise NotImplementedError

    def example(self, index: int) -> Conversation:
        return self._conversation_of(self.rows[index])

    def _conversation_of(self, number: int) -> Conversation:
        [row] = self.table.slice(number, 1).to_pylist()
        missing = [name for name in self.columns if row[name] in (None, "")]
        if missing:
            raise ValueError(f"no {' and no '.join(missing)}")
        return self.conversation(row)

    def _read(self, paths: list[Path]) -> Any:
        """Return the files' rows as one Arrow table, which takes a fraction of the memory of Python objects."""
        import pyarrow as pa
        from pyarrow import parquet

        try:
            return pa.concat_tables(
                parquet.ParquetFile(path).read(columns=list(self.columns)).select(self.columns) for path in paths
            )
        except (pa.ArrowException, OSError, KeyError) as error:
            wanted = " and ".join(self.columns)
            names = ", ".join(map(str, paths))
            raise ValueError(f"{names} is not a Parquet file with {wanted} ({error}): get it again") from error

    @classmethod
    def folder(cls, tasks_dir: Path | str | None) -> Path:
        """Return the folder of this data set in `tasks_dir`, or else among the downloads."""
        parent = get_base_dir() / "tasks" if tasks_dir is None else Path(tasks_dir)
        return parent / cls.name

    @classmethod
    def local(cls, split: str, tasks_dir: Path | str | None = None) -> list[Path]:
        """Return the files of a split that are on this machine; none while a download is not complete.

        Raises ValueError if a downloaded file is not what its manifest says.
        """
        folder = cls.folder(tasks_dir)
        manifest = folder / f"{split}.manifest.json"
        if not manifest.exists():
            path = folder / f"{split}.parquet"
            return [path] if path.is_file() else []
        paths = []
        for entry in read_json(manifest)["files"]:
            path = folder / entry["file"]
            if not path.is_file() or sha256_file(path) != entry["sha256"]:
                raise ValueError(f"{path} is not the file that was downloaded: delete {folder} and run again")
            paths.append(path)
        return paths

    @classmethod
    def fetch(cls, split: str) -> list[Path]:
        """Return the files of a split, downloaded by the first process that asks; the others wait for it.

        Raises ValueError if they cannot be downloaded.
        """
        from filelock import FileLock

        folder = cls.folder(None)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{split}.lock"):
            found = cls.local(split)
            return found or cls._download(split, folder)

    @classmethod
    def _download(cls, split: str, folder: Path) -> list[Path]:
        pattern = re.compile(rf"{re.escape(cls.config)}/{split}-\d+-of-(\d+)\.parquet")
        try:
            commit, listing = list_dataset(cls.repo)
            matches = [match for path in sorted(listing) if (match := pattern.fullmatch(path))]
            # Each file's name says how many there are.
            if not matches or len(matches) != int(matches[0][1]):
                raise ValueError(f"{cls.repo} lists {len(matches)} files {pattern.pattern}")
            files = [listing[match[0]] for match in matches]
            fetch_dataset_files(cls.repo, commit, files, folder)
        except (ConnectionError, ValueError) as error:
            raise ValueError(
                f"{folder / split}.parquet is missing: connect, or set HF_ENDPOINT to a mirror, or name a folder that "
                f"holds {cls.name}/{split}.parquet by --tasks-dir ({error})"
            ) from error
        manifest = {
            "source": f"{hub_address()}/datasets/{cls.repo}",
            "licence": cls.licence,
            "files": [{"file": file.path, "bytes": file.bytes, "sha256": file.sha256} for file in files],
        }
        atomic_write_json(folder / f"{split}.manifest.json", manifest)
        return [folder / file.path for file in files]


class ChoiceTask(ParquetTask):
    """Questions with lettered choices; the answer is the letter alone."""

    eval_type = "categorical"
    baseline = 0.25
