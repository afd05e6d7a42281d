"""More than one process and machine. Oracles: a run that nobody touched, torchrun's own parser of its flags."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import BASE, STEPS, losses, run_ranks
from torch.distributed.run import get_args_parser

from nanochat import checkpoint

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [*BASE, *STEPS, "--num-iterations", "20", "--eval-every", "10"]


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")


# --- the scripts


def workers(parent):
    """The children of a process that run the training script."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
            command = (path / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if int(fields[1]) == parent and b"base_train" in command:
            found.append(int(path.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_a_killed_worker_is_started_again_by_itself(tiny_world):
    """kill -9 one of torchrun's two workers: the job goes on from its last checkpoint to the very same end."""
    flags = [*FLAGS[:-4], "--num-iterations", "60", "--save-every", "10", "--eval-every", "0"]
    for result in run_ranks(2, "scripts.base_train", *flags, "--model-tag", "whole"):
        assert result.code == 0, result
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    command += ["-m", "scripts.base_train", *flags, "--model-tag", "killed", "--resume", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 240
        while max(losses("base", "killed"), default=0) < 15:
            assert job.poll() is None and time.monotonic() < deadline, job.communicate()
            time.sleep(0.005)
        os.kill(max(workers(job.pid)), signal.SIGKILL)
        out, err = job.communicate(timeout=240)
    finally:
        if job.poll() is None:
            job.terminate()
    assert job.returncode == 0, err
    assert re.search(r"resumed base/killed at step [1-5]0 of 60", out)
    assert losses("base", "killed") == losses("base", "whole")
    ends = [checkpoint.read_meta("base", tag, 60)["files"] for tag in ("whole", "killed")]
    assert ends[0] == ends[1]


# --- launchers


def test_slurm_script_starts_what_torchrun_understands(tmp_path):
    """With stand-ins for Slurm's two commands; torch's own parser reads the result."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    stubs = {
        "scontrol": "echo node7; echo node8",
        "srun": 'while [ "$1" != bash ]; do shift; done; exec "$@"',
        "hostname": "echo node8",
        ".venv/bin/python": 'printf "%s\\n" "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" "$@"',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}
    environment = {**os.environ, **slurm, "SLURM_SUBMIT_DIR": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "dev" / "slurm.sh"), "-m", "scripts.base_train", "--depth", "4"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, *words = result.stdout.splitlines()
    assert 30 < int(seconds) < 120, "longer than torchrun waits by default, and within the notice that Slurm gives"
    assert words[:2] == ["-m", "torch.distributed.run"]
    args = get_args_parser().parse_args(words[2:])
    assert (args.nnodes, args.max_restarts, args.rdzv_id, args.rdzv_endpoint) == ("1:2", 3, "123", "node7:20123")
    assert (args.rdzv_conf, args.local_addr, args.module) == ("is_host=0", "node8", True)
    assert args.training_script == "scripts.base_train"
    assert args.training_script_args == ["--depth", "4", "--resume", "auto"]


@pytest.mark.parametrize(
    "venv, given, expected",
    [(True, None, ".venv/bin/python"), (False, None, "python3"), (True, "/opt/env/bin/python", "/opt/env/bin/python")],
)
def test_hosts_script_starts_torchrun_on_every_host(venv, given, expected, tmp_path):
    """With a stand-in for ssh that writes down what each host is to run; in a tree with and without a .venv."""
    tree = tmp_path / "tree"
    (tree / "dev").mkdir(parents=True)
    script = tree / "dev" / "hosts.sh"
    script.write_text((ROOT / "dev" / "hosts.sh").read_text())
    if venv:
        (tree / ".venv" / "bin").mkdir(parents=True)
        (tree / ".venv" / "bin" / "python").symlink_to(sys.executable)
    ssh = tmp_path / "ssh"
    # The script ends with its first host, so this one stays until the second has written its line.
    ssh.write_text(
        "#!/bin/bash\n"
        f'cd {shlex.quote(str(tmp_path))} && echo "$2" > "$1.part" && mv "$1.part" "$1.command"\n'
        "until [ -e node2.command ]; do sleep .05; done\n"
    )
    ssh.chmod(0o755)
    command = [
        "bash",
        str(script),
        "node1 node2=10.0.0.2",
        "-m",
        "scripts.base_train",
        "--depth",
        "4",
    ]
    environment = {**os.environ, "RUN_ON": str(ssh), "NANOCHAT_BASE_DIR": "/shared disk"}
    environment.pop("PYTHON", None)
    if given:
        environment["PYTHON"] = given
    subprocess.run(command, env=environment, check=True, timeout=60)
    for host, address, first in (("node1", "node1", "1"), ("node2", "10.0.0.2", "0")):
        words = shlex.split((tmp_path / f"{host}.command").read_text())
        assert "NANOCHAT_BASE_DIR=/shared disk" in words
        assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110" in words
        start = words.index("torch.distributed.run")
        assert words[start - 2 : start] == [expected, "-m"]
        args = get_args_parser().parse_args(words[start + 1 :])
        assert (args.nnodes, args.rdzv_endpoint, args.rdzv_conf) == ("1:2", "node1:29400", f"is_host={first}")
        assert (args.local_addr, args.training_script) == (address, "scripts.base_train")
        assert args.training_script_args == ["--depth", "4", "--resume", "auto"]
    usage = subprocess.run(["bash", str(ROOT / "dev" / "hosts.sh"), "a b"], capture_output=True, text=True)
    assert usage.returncode == 2 and "usage" in usage.stderr
