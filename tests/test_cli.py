"""Command lines: what a user types, what comes back, and the exit codes: 0 done, 2 wrong usage, 130 interrupted."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanochat import cli
from nanochat.cli import option

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Config:
    depth: int = option(4, "layers")
    matrix_lr: float = option(0.02, "learning rate, 100% of it")
    window_pattern: str = option("SSSL", "windows")
    device_type: str | None = option(None, "device", ("cuda", "cpu"))
    num_iterations: int | None = option(None, "steps", flag="-n")
    resume: str | None = option(None, "go on", bare="newest")
    compile: bool = option(True, "fuse")
    device: tuple[str, ...] | None = option(None, "a device")

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"--depth {self.depth}: must be above 0,\nfor instance 4")


def parse(*argv):
    return cli.parse(Config, argv)


@pytest.fixture
def refused(capsys):
    """Asserts that arguments end the process with status 2 and one line on stderr; returns that line."""

    def check(*argv):
        with pytest.raises(SystemExit) as end:
            parse(*argv)
        assert end.value.code == 2
        out, err = capsys.readouterr()
        assert out == "" and err.endswith("\n") and len(err.splitlines()) == 1
        return err

    return check


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_defaults_are_the_dataclass_defaults():
    assert parse() == Config()


def test_flags_are_read_in_the_type_of_their_field():
    argv = ["--depth", "6", "--matrix-lr", "1e-3", "--window-pattern=SL", "--device-type", "cpu"]
    assert parse(*argv) == Config(6, 0.001, "SL", "cpu")
    assert parse("-n", "3").num_iterations == 3
    assert isinstance(parse("--matrix-lr", "1").matrix_lr, float)
    assert list(parse("--device", "a", "--device", "b").device) == ["a", "b"]
    assert parse("-n", "unset", "--resume", "unset") == parse("-n", "auto") == Config()


@pytest.mark.parametrize("argv, value", [([], True), (["--compile"], True), (["--no-compile"], False)])
def test_booleans_have_two_flags(argv, value):
    assert parse(*argv).compile is value


@pytest.mark.parametrize(
    "argv, value", [([], None), (["--resume"], "newest"), (["--resume", "120"], "120"), (["--resume=7"], "7")]
)
def test_resume_with_and_without_a_value(argv, value):
    assert parse(*argv).resume == value
    assert parse(*argv, "--depth", "8") == Config(depth=8, resume=value)


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--dept", "3"], "--dept"),  # no abbreviations: a typo is not another flag
        (["--unknown"], "--unknown"),
        (["stray"], "stray"),
        (["two\nlines"], "two lines"),
        (["--depth", "four"], "--depth"),
        (["--depth", "4.5"], "--depth"),
        (["--depth"], "--depth"),
        (["--device-type", "tpu"], "--device-type"),
        (["--depth", "0"], "--depth 0: must be above 0, for instance 4"),
    ],
)
def test_a_wrong_flag_is_named_on_one_line(argv, named, refused):
    assert named in refused(*argv)


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    out = capsys.readouterr().out
    assert end.value.code == 0
    for text in ("--depth", "(default: 4)", "--no-compile", "--config", "100% of it", "(default: unset)", "-n"):
        assert text in out


def test_a_config_file_stands_between_defaults_and_command_line(yaml_file):
    path = yaml_file("depth: 8\nmatrix-lr: 0.5\nnum_iterations: 7\ncompile: false\nresume: '30'\n")
    assert parse("--config", path) == Config(8, 0.5, num_iterations=7, compile=False, resume="30")
    argv = ["--depth", "2", "--config", path, "--compile"]
    assert parse(*argv) == Config(2, 0.5, num_iterations=7, compile=True, resume="30")
    # the command line wins even where it says the default
    assert parse("--config", path, "--depth", "4").depth == 4


@pytest.mark.parametrize(
    "text, config",
    [
        ("", Config()),
        ("# nothing\n", Config()),
        ("matrix-lr: 1\n", Config(matrix_lr=1.0)),
        ("matrix-lr: 1e-3\n", Config(matrix_lr=0.001)),  # text in YAML 1.1, which wants 1.0e-3
        ("num-iterations: null\ndevice-type: null\n", Config()),
        ("num_iterations: auto\n", Config()),
        ("device: [a, b]\n", Config(device=["a", "b"])),
        ("device: a\n", Config(device=["a"])),
    ],
)
def test_config_files_that_are_right(text, config, yaml_file):
    got = parse("--config", yaml_file(text))
    assert got == config and isinstance(got.matrix_lr, float)


@pytest.mark.parametrize(
    "text, named",
    [
        ("dpeth: 3\n", "--dpeth"),
        ("depth: four\n", "--depth: invalid int value: 'four'"),
        ("depth: 4.5\n", "--depth: invalid int value: '4.5'"),
        ("depth: true\n", "--depth: expected one argument"),
        ("depth:\n", "--depth: invalid int value: 'unset'"),
        ("depth: [1, 2]\n", "--depth: invalid int value: '[1, 2]'"),
        ("matrix-lr: fast\n", "--matrix-lr: invalid float value: 'fast'"),
        ("compile: 1\n", "--compile"),
        ("device-type: tpu\n", "--device-type: invalid choice: 'tpu'"),
        ("depth: 0\n", "--depth 0: must be above 0"),
        ("- depth\n", "must hold 'flag: value' lines"),
        ("depth: [\n  1\n", "not valid YAML"),
        (b"depth: \xff\n", "not valid YAML"),
    ],
)
def test_a_wrong_config_file_is_named_on_one_line(text, named, yaml_file, refused):
    path = yaml_file(text)
    line = refused("--config", path)
    assert named in line and (path in line or text == "depth: 0\n")  # the dataclass knows no file


def test_a_missing_config_file_is_named(refused):
    assert "--config nowhere.yaml: No such file" in refused("--config", "nowhere.yaml")


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("no tokenizer:\n run scripts.tok_train"), 2, "error: no tokenizer: run scripts.tok_train\n"),
        (FileNotFoundError(2, "No such file or directory", "a.bin"), 2, "error: [Errno 2] No such file or"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_run_turns_errors_into_exit_codes(error, code, line, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(raising(error))
    err = capsys.readouterr().err
    assert end.value.code == code and err.startswith(line) and len(err.splitlines()) == bool(line)


@pytest.mark.parametrize(
    "bug", [RuntimeError("shape mismatch"), TypeError(), KeyError("x"), AssertionError("invariant")]
)
def test_run_keeps_the_traceback_of_a_bug(bug):
    with pytest.raises(type(bug)):
        cli.run(raising(bug))


def python(code, **options):
    run = [sys.executable, "-c", f"from nanochat import cli\n{code}"]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


def test_exit_codes_of_real_processes():
    done = python("cli.run(lambda: print('hello'))")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")
    mistake = python("cli.run(lambda: int('x'))")
    assert mistake.returncode == 2 and len(mistake.stderr.splitlines()) == 1
    bug = python("cli.run(lambda: 1 / 0)")
    assert bug.returncode == 1 and "Traceback" in bug.stderr and "ZeroDivisionError" in bug.stderr


def test_a_reader_that_goes_away_is_no_error():
    code = "from nanochat import cli; cli.run(lambda: [print(i) for i in range(100000)])"
    shell = f'"{sys.executable}" -c "{code}" | head -n 1; exit ${{PIPESTATUS[0]}}'
    result = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "0\n", "")
