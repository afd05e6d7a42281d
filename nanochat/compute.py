"""The machine that a process runs on: its device, compute dtype and rank, and what the hardware can do.

Every script begins with `Compute.create`, which picks the device, joins the other ranks that torchrun has started, and
returns a `Compute` that is handed on. On one process its reductions return what they are given, so the rest of the
project is written once, for any number of ranks. Below it stand questions about the hardware.
"""

import ctypes
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nanochat.common import read_if_there

T = TypeVar("T")

# Dense bf16 tensor-core peaks in FLOP/s, from the vendors' data sheets.
# The first name found as whole words in the device's own name wins, so longer names stand before their prefixes.
GPU_PEAKS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 125e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """Device, compute dtype and the process's rank. Reductions do nothing on one process."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1

    @classmethod
    def create(cls, device_type: str | None = None) -> "Compute":
        """Set this process up: choose the device (cuda, then mps, then cpu), set threads, join the other ranks.

        device_type: cuda | mps | cpu; None chooses. Raises ValueError when the device asked for is not there.
        """
        # torchrun tells each process its place through these variables
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        rank = int(os.environ.get("RANK", 0))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

        # Segments that grow leave no holes between activations of different sizes, so more rows fit. PyTorch reads this
        # when a process first allocates on a GPU.
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name, which a user may have set
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

        available = ["cpu"]
        if torch.backends.mps.is_available():
            available.insert(0, "mps")
        if torch.cuda.is_available():
            available.insert(0, "cuda")
        if device_type is None:
            device_type = available[0]
        if device_type not in available:
            raise ValueError(f"--device-type {device_type} is not available here: choose one of {', '.join(available)}")

        if device_type == "cuda":
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        else:
            device = torch.device(device_type)
        if device_type == "cpu":
            _keep_freed_memory()
            _keep_few_kernels()
            # Ranks on one machine share its cores. A number of threads that the user gives is for one process.
            if "OMP_NUM_THREADS" not in os.environ or local_world_size > 1:
                torch.set_num_threads(max(1, usable_cores() // local_world_size))

        dtype = pick_dtype(device)
        # A bf16 run may round fp32 products to tf32, too; an fp32 run is there to be exact.
        torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")
        if world_size > 1 and not dist.is_initialized():
            _join_ranks(device, rank, world_size)
        return cls(device=device, dtype=dtype, rank=rank, world_size=world_size)

    @property
    def name(self) -> str:
        """The device as its vendor names it."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 peak of one device in FLOP/s, or None when unknown."""
        return peak_flops(self.name)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_memory(self) -> int:
        """Return the most bytes held so far: device memory on CUDA, resident memory of the process elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform == "win32":
            import psutil  # which only Windows needs

            return psutil.Process().memory_info().peak_wset
        import resource  # which Windows lacks

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024  # Linux counts in KiB

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the ranks, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` holds on any rank; ranks decide with it to do something together."""
        if self.world_size == 1:
            return flag
        return bool(self.all_reduce_sum(torch.tensor(int(flag), device=self.device)).item())

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order; they may be any that pickle takes. All ranks call this."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_rank_0(self, make: Callable[[], T]) -> T:
        """Run `make` on rank 0 alone and return its result on every rank.

        A ValueError or OSError that it raises is raised on every rank. The others wait on a group of their own, with
        more patience than for a step: preparing data may take long.
        """
        if self.world_size == 1:
            return make()
        group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome[0] = make()
            except (ValueError, OSError) as error:
                outcome[0] = error
        dist.broadcast_object_list(outcome, src=0, group=group)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def close(self) -> None:
        """Leave the process group; every rank calls this."""
        if dist.is_initialized():
            dist.barrier()  # gloo's threads let go of the last tensors, which at exit could abort (PyTorch PR 179291)
            dist.destroy_process_group()


def _join_ranks(device: torch.device, rank: int, world_size: int) -> None:
    """Join the process group: nccl between GPUs, gloo between CPUs."""
    # A rank that waits this long for another takes it for dead and ends, for torchrun to start it again.
    timeout = timedelta(seconds=float(os.environ.get("NANOCHAT_TIMEOUT") or 600))
    store = None
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps its store over restarts, and in it the addresses of the dead (torch 2.13): look each attempt's
        # up under a name of its own. Several hosts count restarts each for itself, so that there dev/hosts.sh and
        # dev/slurm.sh have torchrun make a new store.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        torchruns_store, _, _ = next(dist.rendezvous("env://", rank=rank, world_size=world_size, timeout=timeout))
        store = dist.PrefixStore(f"attempt_{attempt}", torchruns_store)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        device_id=device if device.type == "cuda" else None,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )


def _keep_freed_memory() -> None:
    """Make glibc keep freed pages: large activations otherwise return to the kernel and fault in again each step.

    The same as MALLOC_MMAP_MAX_=0, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_, without asking the user to set them.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold = -1  # these numbers are <malloc.h>'s
    m_top_pad = -2
    m_mmap_max = -4
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 256 << 20)


def _keep_few_kernels() -> None:
    """Make oneDNN keep 64 kernels, read when the first product is made.

    It makes one for each shape of a bf16 product and keeps 1,024, which is 850 MB where lengths vary. Making one takes
    0.3 ms; a training step at T=2048 has 80 shapes.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's, and PyTorch's in front of it
        os.environ.setdefault(cache, "64")


# --- what the hardware can do


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak in FLOP/s of a GPU by its name, or None when unknown (MFU is then n/a, never 0)."""
    for name, peak in GPU_PEAKS.items():
        # whole words: an L40 is no L4, an RTX A1000 no A100
        if re.search(rf"\b{name}\b", device_name):
            return peak
    return None


def cpu_has_bf16() -> bool:
    """Return whether this processor multiplies bf16 matrices in hardware (AVX512-BF16, AMX, or Arm BF16)."""
    flags = read_if_there("/proc/cpuinfo")
    return any(f" {name}" in flags for name in ("avx512_bf16", "amx_bf16", "bf16"))


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    if sys.platform == "linux":  # where a container or taskset may allow fewer than there are
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile has what it needs: a C++ compiler on CPU, Triton on CUDA."""
    if device.type == "cpu":
        compilers = (os.environ.get("CXX") or "g++", "clang++")
        return any(shutil.which(name) for name in compilers)
    return device.type == "cuda"


def pick_dtype(device: torch.device) -> torch.dtype:
    """Return the compute dtype: `$NANOCHAT_DTYPE`, else bf16 where the hardware multiplies it, else fp32.

    Raises ValueError when the variable names no dtype that we know.
    """
    asked = os.environ.get("NANOCHAT_DTYPE")
    if asked:
        if asked not in DTYPES:
            raise ValueError(f"NANOCHAT_DTYPE={asked}: choose one of {', '.join(DTYPES)}")
        return DTYPES[asked]
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device)[0] >= 8  # Ampere and later
    else:
        has_bf16 = device.type == "cpu" and cpu_has_bf16()
    return torch.bfloat16 if has_bf16 else torch.float32


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still take: of a GPU, or its rank's part of the machine's memory."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if sys.platform == "win32":
        import psutil

        room = [psutil.virtual_memory().available]
    else:
        room = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]  # all that is installed
    available = re.search(r"MemAvailable:\s+(\d+) kB", read_if_there("/proc/meminfo"))
    if available:
        room.append(int(available[1]) * 1024)
    room += _room_in_control_groups()
    return min(room) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _room_in_control_groups() -> Iterator[int]:
    """Yield the bytes left in each control group that limits this process, as a container's does.

    Only anonymous memory counts as used: pages of files make room when memory is needed.
    """
    for line in read_if_there("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":  # version 1 has a hierarchy for each controller
            limit_file = "memory.limit_in_bytes"
        elif controllers == "":  # version 2 has one for all
            limit_file = "memory.max"
        else:
            continue
        group = Path("/sys/fs/cgroup", controllers, path.strip("/"))
        for folder in (group, *group.parents):
            limit = read_if_there(folder / limit_file).strip()
            used = re.search(r"^(?:anon|total_rss) (\d+)", read_if_there(folder / "memory.stat"), re.MULTILINE)
            if limit.isdigit() and used:
                yield max(0, int(limit) - int(used[1]))
