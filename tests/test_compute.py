"""The machine as `Compute` sees it: what the user's environment asks for, what is known of hardware, real ranks."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat import compute
from nanochat.compute import Compute, cpu_has_bf16, peak_flops, pick_dtype

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Creating a `Compute` sets threads and precision of the whole process: put them back."""
    for name in ("NANOCHAT_DTYPE", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_environment_chooses_the_dtype(name, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", name)
    assert pick_dtype(CPU) == getattr(torch, name)
    assert Compute.create("cpu").dtype == getattr(torch, name)


@pytest.mark.parametrize("wrong", ["bf16", "float64", "FLOAT32"])
def test_another_dtype_is_refused_with_the_choices(wrong, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", wrong)
    with pytest.raises(ValueError, match=f"NANOCHAT_DTYPE={wrong}: choose one of float32, bfloat16, float16"):
        Compute.create("cpu")


@pytest.mark.parametrize("empty", [None, ""])
def test_without_a_wish_the_processor_decides(empty, monkeypatch):
    if empty is not None:
        monkeypatch.setenv("NANOCHAT_DTYPE", empty)
    assert pick_dtype(CPU) == (torch.bfloat16 if cpu_has_bf16() else torch.float32)


def test_a_bf16_processor_is_one_whose_flags_say_so():
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        pytest.skip("no /proc/cpuinfo here")
    assert cpu_has_bf16() == bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def test_fp32_on_request_is_exact_fp32(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    Compute.create("cpu")
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("device_type", ["tpu", "gpu", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_there_is_refused_by_flag(device_type):
    with pytest.raises(ValueError, match=rf"--device-type {device_type} is not available here: choose one of .*cpu"):
        Compute.create(device_type)


@pytest.mark.parametrize(
    ("set_before", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
    ],
)
def test_gpu_memory_grows_in_segments_unless_the_user_says_otherwise(monkeypatch, set_before, expected):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "")  # so that what `create` sets is undone
        monkeypatch.delenv(name)
    for name, value in set_before.items():
        monkeypatch.setenv(name, value)
    seen = []

    def cuda_starts():
        seen.append({name: os.environ[name] for name in names if name in os.environ})
        return False

    monkeypatch.setattr(torch.cuda, "is_available", cuda_starts)
    Compute.create("cpu")
    assert seen[0] == expected, "before anything asks for CUDA"


def test_one_process_is_rank_zero_of_one_and_reduces_nothing():
    compute = Compute.create("cpu")
    assert (compute.device, compute.rank, compute.world_size, compute.name) == (CPU, 0, 1, "cpu")
    assert torch.equal(compute.all_reduce_sum(torch.ones(3)), torch.ones(3))
    assert compute.any_rank(True) is True and compute.any_rank(False) is False
    assert compute.gather("x") == ["x"]
    compute.barrier(), compute.synchronize(), compute.close()
    with pytest.raises(dataclasses.FrozenInstanceError):
        compute.rank = 1


def test_peak_memory_counts_bytes():
    compute = Compute(CPU, torch.float32)
    before = compute.peak_memory()
    held = torch.ones(60 << 20)  # 240 MiB
    after = compute.peak_memory()
    assert 2**25 < before <= after < 2**38 and held.sum() > 0  # the order of a process, not kilobytes of it


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 125),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peaks_of_known_gpus(name, tflops):
    assert peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA H20", "Some GPU 9000", "cpu", ""])
def test_peaks_of_unknown_gpus_are_unknown(name):
    """Not zero, and not those of a card whose name begins alike: utilization would be wrong and look right."""
    assert peak_flops(name) is None
    assert Compute(CPU, torch.float32).peak_flops is None


RANK_CODE = """
import torch
from nanochat.compute import Compute
compute = Compute.create("cpu")
assert (compute.rank, compute.world_size, torch.get_num_threads()) == (int(__import__("os").environ["RANK"]), 2, 1)
total = compute.all_reduce_sum(torch.tensor([1.0 + compute.rank, 10.0]))
flags = [compute.any_rank(flag) for flag in (compute.rank == 1, False, True)]
assert compute.gather({"rank": compute.rank}) == [{"rank": 0}, {"rank": 1}]
compute.barrier()
compute.close()
print(total.tolist(), flags)
"""


def test_two_real_ranks_reduce_together():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    common |= {"LOCAL_WORLD_SIZE": str(2 * (os.cpu_count() or 1))}  # more ranks than cores: one thread each
    run = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK_CODE], env={**common, "RANK": str(r), "LOCAL_RANK": str(r)}, **run)
        for r in range(2)
    ]
    for process in ranks:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "[3.0, 20.0] [True, False, True]\n"), err


def test_the_free_memory_of_this_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 1 << 20 < compute.free_memory(torch.device("cpu")) < installed
    groups = "4:memory:/a/b\n2:cpu:/\n0::/c\n"
    files = {
        "/proc/self/cgroup": groups,
        "/sys/fs/cgroup/memory/a/memory.limit_in_bytes": "90000\n",
        "/sys/fs/cgroup/memory/a/memory.stat": "cache 7\nrss 1\ntotal_rss 20000\n",
        "/sys/fs/cgroup/c/memory.max": "80000\n",
        "/sys/fs/cgroup/c/memory.stat": "anon 30000\nfile 7\n",
        "/sys/fs/cgroup/memory.max": "max\n",
    }
    monkeypatch.setattr(compute, "read_if_there", lambda path: files.get(str(path), ""))
    assert compute.free_memory(torch.device("cpu")) == 50000
    del files["/sys/fs/cgroup/c/memory.max"]
    assert compute.free_memory(torch.device("cpu")) == 70000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert compute.free_memory(torch.device("cpu")) == 35000
