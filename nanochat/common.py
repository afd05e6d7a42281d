"""Small things that every stage needs: where files go, how they are written, and how measurements are recorded.

Whatever must survive a kill or a power cut is written through `atomic_write`; whatever is a measurement goes through
`write_record`, which adds where it comes from.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

STAGES = ("base", "mid", "sft", "rl")  # of training, in their order; each continues from the one before


def get_base_dir() -> Path:
    """Return the folder that holds everything written: `$NANOCHAT_BASE_DIR`, else `~/.cache/nanochat`."""
    chosen = os.environ.get("NANOCHAT_BASE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return Path.home() / ".cache" / "nanochat"


def scripts_root() -> Path:
    """Return the folder that holds scripts/ and tasks/: the checkout, or what pip has put in its place."""
    package = Path(__file__).parent
    installed = package / "tree"
    return installed if installed.is_dir() else package.parent


def is_checkout() -> bool:
    """Return whether this code runs from a checkout, and not as pip has installed it."""
    return (scripts_root() / "pyproject.toml").exists()


def print0(*args: Any, **kwargs: Any) -> None:
    """Print on the first process of a distributed run only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, flush=True, **kwargs)


def fsync_dir(path: Path) -> None:
    """Make a rename inside `path` durable: a name belongs to its directory's data, not to the file's."""
    if sys.platform == "win32":
        return  # which opens no directories
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: Path | str, data: bytes | str) -> None:
    """Write `data` so that `path` holds either its old content or all of the new, even after a power cut.

    The new content goes to a temporary file, which takes the place of the old one in a single rename.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())  # before the rename: else the name could outlive a power cut and its content not
        os.replace(temporary, path)
        fsync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_json(path: Path | str, value: Any) -> None:
    """Write a JSON value atomically, indented, ending in a newline."""
    atomic_write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read the JSON value in `path`. Raises ValueError that names the file when it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): delete it and make it again") from error


def read_sections(path: Path) -> dict[str, str]:
    """Read the parts of a text file by their headings, lines of `=== HEADING`; text before the first is ignored."""
    _, *parts = re.split(r"^=== (.+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {heading: text.removesuffix("\n") for heading, text in zip(parts[::2], parts[1::2])}


def read_lists(path: Path) -> dict[str, list[str]]:
    """Read the parts of a text file as lists of lines."""
    return {heading: text.strip().split("\n") for heading, text in read_sections(path).items()}


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def git_commit() -> str:
    """Return the commit of this checkout, with `+` when files differ from it; "unknown" outside git."""
    if not is_checkout():
        return "unknown"  # and not the commit of a project that has us installed in a folder of its own
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run([*describe, "--dirty=+"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_if_there(path: Path | str) -> str:
    """Return the text of a file, or "" when it cannot be read, as /proc on another system."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def processor_name() -> str:
    """Return the processor's name as the operating system gives it."""
    found = re.search(r"^model name.*?:(.*)", read_if_there("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def provenance() -> dict[str, Any]:
    """Return where a record comes from: commit, hardware, versions, date (UTC, ISO 8601)."""
    import torch

    hardware = {"processor": processor_name(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name(0)
        hardware["gpus"] = torch.cuda.device_count()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": metadata.version("numpy"),
        "tiktoken": metadata.version("tiktoken"),
        "safetensors": metadata.version("safetensors"),
    }
    return {
        "commit": git_commit(),
        "hardware": hardware,
        "versions": versions,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_record(path: Path | str, record: dict[str, Any]) -> None:
    """Write a measurement as JSON together with its provenance."""
    atomic_write_json(path, {**record, **provenance()})
