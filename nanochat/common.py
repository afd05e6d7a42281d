"""Small things every stage needs: where files go, how they are written, and how runs are recorded."""

import functools
import hashlib
import json
import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

STAGES = ("base", "mid", "sft", "rl")  # of training, in their order; each continues from the one before


def get_base_dir() -> Path:
    """The folder that holds everything written: `$NANOCHAT_BASE_DIR`, else `~/.cache/nanochat`."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()


def print0(*args: Any, **kwargs: Any) -> None:
    """Print on the first process of a distributed run only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, **{"flush": True, **kwargs})


def fsync_dir(path: Path) -> None:
    """Make a rename inside `path` durable: a directory entry is data of the directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: Path | str, data: bytes | str) -> None:
    """Write `data` so that `path` holds either its old content or all of the new, even after a power cut."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        fsync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_json(path: Path | str, value: Any) -> None:
    """`atomic_write` of a JSON value, indented, ending in a newline."""
    atomic_write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """The JSON value in `path`; a damaged file raises ValueError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): delete it and make it again") from error


def read_sections(path: Path) -> dict[str, str]:
    """The parts of a text file by their headings, `=== HEADING`; what stands before the first belongs to none."""
    _, *parts = re.split(r"^=== (.+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {heading: text.removesuffix("\n") for heading, text in zip(parts[::2], parts[1::2])}


@functools.cache
def read_lists(path: Path) -> dict[str, list[str]]:
    """`read_sections` as lists of lines, without empty ones at their ends."""
    return {heading: text.strip().split("\n") for heading, text in read_sections(path).items()}


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as f:
        digest = hashlib.sha256()
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def git_commit() -> str:
    """The commit of this checkout, with `+` when files differ from it; `unknown` outside git."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run([*describe, "--dirty=+"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_if_there(path: Path | str) -> str:
    """The text of a file; nothing where there is none or it may not be read, as in /proc on another system."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def processor_name() -> str:
    """The processor as the operating system names it."""
    found = re.search(r"^model name.*?:(.*)", read_if_there("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def provenance() -> dict[str, Any]:
    """What a record says of where it comes from: commit, hardware, versions, date (UTC, ISO 8601)."""
    import torch

    hardware = {"processor": processor_name(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        hardware |= {"gpu": torch.cuda.get_device_name(0), "gpus": torch.cuda.device_count()}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {package: metadata.version(package) for package in ("numpy", "tiktoken", "safetensors")}
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"commit": git_commit(), "hardware": hardware, "versions": versions, "date": date}


def write_record(path: Path | str, record: dict[str, Any]) -> None:
    """Write a measurement as JSON together with its provenance."""
    atomic_write_json(path, {**record, **provenance()})
