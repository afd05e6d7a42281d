"""The comparison with the reference: what is read from a run, what is held equal, what is concluded."""

import json
import os
import pickle
import signal
import sys
import threading
import time

import pytest
import torch

from dev import bench
from dev.compare import Compare, Run, at_equal_time, at_equal_tokens, measure, steps_in
from dev.compare_parity import SCALAR_LR, STEPS, matched_flags, reference_weights, verdict
from dev.compare_sides import (
    CHILD,
    Outcome,
    Transcript,
    child_environment,
    prepare_reference,
    read_reference,
    save_validation_rows,
    supervise,
)
from nanochat import cli, recipe
from nanochat.dataloader import RowLoader, build_token_shards
from nanochat.dataset import list_shards
from nanochat.gpt import GPT, GPTConfig, rotate
from nanochat.tokenizer import load_tokenizer

CONFIG = GPTConfig(sequence_len=32, vocab_size=100, n_layer=3, n_head=2, n_kv_head=2, n_embd=32)


def outcome(dt: float, evals: dict[int, float], steps: int = 20, first_step: float = 30.0) -> Outcome:
    return Outcome([2.0] * steps, [25.0] + [dt] * (steps - 1), evals, first_step, 99.0, 3 << 30)


# --- reading a run ---------------------------------------------------------------------------------------------------


def test_losses_come_back_from_the_average_that_the_reference_prints():
    losses, average, lines = [6.9, 6.5, 6.6, 5.9, 5.2], 0.0, [(10.0, "Total batch size 1,024")]
    lines.append((14.0, "Step 00000 | Validation bpb: 3.940605"))
    for step, loss in enumerate(losses):
        average = 0.9 * average + 0.1 * loss
        shown = average / (1 - 0.9 ** (step + 1))
        line = f"step {step:05d}/00005 (0.00%) | loss: {shown:.6f} | lrm: 0.03 | dt: {100 + step:.2f}ms | tok/sec: 7"
        lines.append((20.0 + step, line))
    lines += [(26.0, "Step 00005 | Validation bpb: 2.5"), (27.0, "Peak memory usage: 512.50MiB")]
    read = read_reference(Transcript(lines, 28.0, 1 << 30))
    assert read.losses == pytest.approx(losses, abs=2e-5)
    assert read.seconds == pytest.approx([0.1, 0.101, 0.102, 0.103, 0.104])
    assert read.evals == {0: 3.940605, 5: 2.5}
    assert read.first_step == 16.0  # 20 less the 4 of the evaluation before it
    assert read.peak_bytes == 512.5 * 2**20
    on_cpu = [(when, line.replace("512.50", "0.00")) for when, line in lines]
    assert read_reference(Transcript(on_cpu, 28.0, 1 << 30)).peak_bytes == 1 << 30


def test_a_run_without_steps_is_no_reference():
    with pytest.raises(ValueError, match="--baseline-dir"):
        read_reference(Transcript([(1.0, "hello")], 1.0, 1))


def test_the_clock_takes_the_start_once_and_then_the_steps():
    run = outcome(0.5, {})
    assert run.clock(1) == 30.0
    assert run.clock(20) == 30.0 + 19 * 0.5


def test_supervise_gives_lines_in_time_and_the_peak_of_the_process(tmp_path):
    code = (
        "import time; b = bytearray(300 << 20); b[::4096] = b'x' * 76800; print('a'); time.sleep(.2); print('step 1')"
    )
    seen = supervise([sys.executable, "-u", "-c", code], dict(os.environ), tmp_path / "logs" / "x.log")
    (first, a), (second, b) = seen.lines
    assert (a, b) == ("a", "step 1") and second - first > 0.15 and seen.wall >= second
    assert 300 << 20 < seen.peak_bytes < 400 << 20
    assert (tmp_path / "logs" / "x.log").read_text() == "a\nstep 1\n"
    assert seen.when("step +1") == second


def test_a_failure_names_the_log_and_its_last_line(tmp_path):
    with pytest.raises(ValueError, match=r"status 3 \(no such thing\).*x\.log"):
        supervise([sys.executable, "-c", "print('no such thing'); exit(3)"], dict(os.environ), tmp_path / "x.log")


def test_an_interrupt_leaves_no_process(tmp_path):
    script = f"sleep 100 & echo $! > {tmp_path}/pid; echo up; wait"

    def interrupt():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        supervise(["bash", "-c", script], dict(os.environ), tmp_path / "x.log")
    grandchild = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _alive(grandchild):
        time.sleep(0.05)
    assert not _alive(grandchild)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# --- what is held equal ----------------------------------------------------------------------------------------------


def test_both_evaluate_the_same_rows(tiny_world, tmp_path):
    tokens = save_validation_rows(tmp_path / "val.pt", "corpus", 64, 1000, 4)
    assert tokens == 12 * 64  # whole batches of four rows, no more than asked for
    rows = torch.load(tmp_path / "val.pt")
    ours = RowLoader(build_token_shards("corpus", "val", load_tokenizer()), 64, 1, 1, 0)  # as Trainer builds it
    inputs, targets = (torch.cat(part) for part in zip(*ours.first_rows(12)))
    assert torch.equal(rows["inputs"], inputs) and torch.equal(rows["targets"], targets)
    with pytest.raises(ValueError, match="--seq-len"):
        save_validation_rows(tmp_path / "val.pt", "corpus", 64, 100, 4)


def test_the_reference_gets_our_text_and_tokenizer(tiny_world, tmp_path):
    tokenizer = load_tokenizer()
    for _ in range(2):  # again over what is there
        prepare_reference(tmp_path / "ref", "corpus", tokenizer)
    shards = [path.resolve() for path in sorted((tmp_path / "ref" / "base_data_climbmix").iterdir())]
    assert shards == [*list_shards("corpus", "train"), *list_shards("corpus", "val")]
    encoding = pickle.loads((tmp_path / "ref" / "tokenizer" / "tokenizer.pkl").read_bytes())
    text = "The capital of France is Paris. 123 <|bos|>"
    assert encoding.encode_ordinary(text) == tokenizer.encode(text)
    token_bytes = torch.load(tmp_path / "ref" / "tokenizer" / "token_bytes.pt").tolist()
    for token in range(encoding.n_vocab):
        special = token in encoding._special_tokens.values()
        assert token_bytes[token] == (0 if special else len(encoding.decode_single_token_bytes(token)))


def test_a_checkout_runs_with_its_own_modules_given_rows_and_weights(tmp_path):
    checkout = tmp_path / "checkout"
    sources = {
        "nanochat/__init__.py": "",
        "nanochat/dataloader.py": "",
        "nanochat/gpt.py": """
import torch
class GPT(torch.nn.Linear):
    def init_weights(self):
        self.ready = True
    def setup_optimizer(self, lr):
        self.smear_lambda = torch.nn.Parameter(torch.zeros(1))
        groups = [{"params": [torch.zeros(5000)], "lr": lr}, {"params": [self.smear_lambda], "lr": lr}]
        return torch.optim.AdamW(groups, eps=1e-10)""",
        "scripts/base_train.py": """
import sys
from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit as val
from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit as train
from nanochat.gpt import GPT
model = GPT(1, 1, bias=False)
model.init_weights()
rows = train(None, 2, 3, split="train", device="cpu", resume_state_dict=None)
first, again = [next(rows) for _ in range(3)][::2]
x, y = next(val(None, 1, 3, split="val", device="cpu"))
for group in model.setup_optimizer(lr=0.2).param_groups:
    print(group["lr"], group["eps"])
shown = [tensor.tolist() for tensor in (first[0], again[0], y)]
print(sys.argv[1:], model.ready, model.weight.item(), first[2]["epoch"], *shown)
""",
    }
    for name, text in sources.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    inputs = torch.arange(12).view(4, 3)
    torch.save({"inputs": inputs, "targets": inputs + 1}, tmp_path / "rows.pt")
    torch.save({"weight": torch.full((1, 1), 0.5)}, tmp_path / "start.pt")
    files = {"val": "rows.pt", "train": "rows.pt", "start": "start.pt"}
    hooks = {name: str(tmp_path / file) for name, file in files.items()} | {"scalars": [0.02, 1e-6]}
    env = child_environment(tmp_path, None)
    command = [sys.executable, str(CHILD), str(checkout), json.dumps(hooks), "--depth=2"]
    seen = supervise(command, env | {"PYTHONPATH": str(CHILD.parent.parent)}, tmp_path / "x.log")
    assert seen.lines[-1][1] == "['--depth=2'] True 0.5 1 [[0, 1, 2], [3, 4, 5]] [[0, 1, 2], [3, 4, 5]] [[1, 2, 3]]"
    assert [line for _, line in seen.lines[-3:-1]] == ["0.2 1e-10", "0.02 1e-06"]
    assert not list(checkout.rglob("*.pyc"))


# --- parity ----------------------------------------------------------------------------------------------------------


def test_mirrored_queries_and_keys_turned_the_other_way_attend_alike():
    model = GPT(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    ours = model.state_dict()
    theirs = reference_weights(ours, CONFIG.head_dim)
    x_TC, angles = torch.randn(7, 32), torch.rand(7, 1, 8) * 3

    def scores(q_CC, k_CC, direction: float) -> torch.Tensor:
        q, k = (rotate((x_TC @ w.T).view(7, 2, 16), angles.cos(), direction * angles.sin()) for w in (q_CC, k_CC))
        return torch.einsum("qhd,khd->hqk", q, k)

    ours_qk = [ours[f"blocks.1.attn.{part}.weight"] for part in "qk"]
    theirs_qk = [theirs[f"transformer.h.1.attn.c_{part}.weight"] for part in "qk"]
    torch.testing.assert_close(scores(*theirs_qk, -1.0), scores(*ours_qk, 1.0))
    assert (scores(*ours_qk, -1.0) - scores(*ours_qk, 1.0)).abs().max() > 0.1


def test_every_weight_has_one_name_of_the_reference():
    model = GPT(CONFIG)
    model.init_weights()
    theirs = reference_weights(model.state_dict(), CONFIG.head_dim)
    layer = ["attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    names = {f"transformer.h.{i}.{part}.weight" for i in range(3) for part in layer}
    names |= {f"transformer.h.{i}.attn.ve_gate.weight" for i in (0, 2)} | {f"value_embeds.{i}.weight" for i in (0, 2)}
    names |= {"transformer.wte.weight", "lm_head.weight", "resid_lambdas", "x0_lambdas", "smear_gate.weight"}
    assert set(theirs) == names | {"smear_lambda", "backout_lambda"}
    assert sum(w.numel() for w in theirs.values()) == sum(p.numel() for p in model.parameters())
    assert theirs["smear_lambda"].shape == theirs["backout_lambda"].shape == (1,)


def test_matched_flags_give_equal_rates_after_each_side_scales_them():
    config = recipe.model_config(2, 512, 128, head_dim=64)
    ours, theirs = (dict(zip(flags[::2], map(float, flags[1::2]))) for flags in matched_flags(config))
    batch = 4 * 128
    for name in ("matrix", "embedding", "unembedding", "scalar"):
        effective = ours[f"--{name}-lr"] * recipe.learning_rate_scales(batch)[name]
        assert effective == pytest.approx(theirs[f"--{name}-lr"] * (batch / 2**19) ** 0.5)
    assert ours["--scalar-lr"] * recipe.learning_rate_scales(batch)["scalar"] == pytest.approx(SCALAR_LR)

    def counted(width: int, layers: int) -> int:  # matrices, gates of every other layer, head
        return 12 * width**2 * layers + 12 * (width // 64) * -(-layers // 2) + 512 * width

    decay = theirs["--weight-decay"] * (batch / 2**19) ** 0.5 * counted(768, 12) / counted(128, 2)
    assert decay == pytest.approx(ours["--weight-decay"])
    assert (
        0 < ours["--warmup-steps"] == theirs["--warmup-steps"] <= min(STEPS.values()) // 10
    )  # more would be cut by us alone


def test_verdict_fails_on_one_evaluation_or_one_early_loss_apart():
    theirs = outcome(0.1, {0: 9.0, 10: 2.0, 20: 1.0}, 30)
    near, far = outcome(0.1, {10: 2.08, 20: 0.96}, 30), outcome(0.1, {10: 2.12, 20: 1.0}, 30)
    assert verdict("own", near, theirs)["passed"] and not verdict("own", far, theirs)["passed"]
    assert verdict("own", near, theirs)["evals_apart"] == pytest.approx(0.04)
    near.losses[19] += 0.002
    assert not verdict("equal", near, theirs)["passed"]
    near.losses[19] -= 0.002
    near.losses[20] += 0.002  # after the first 20 steps
    assert verdict("equal", near, theirs)["passed"]


# --- conclusions -----------------------------------------------------------------------------------------------------


def test_ratios_are_taken_round_by_round(tmp_path):
    config = Compare(str(_checkout(tmp_path)), batch_tokens=8192, steps=20)
    runs = []
    for repeat, drift in enumerate((1.0, 10.0, 2.0)):  # the machine slows down for both
        for side, dt in (("ours", 0.5), ("reference default", 1.5)):
            runs.append(Run(side, repeat, None, 20, outcome(dt * drift, {10: 3.0, 20: 2.0 + dt}, first_step=dt)))
    ours, theirs = at_equal_tokens(config, runs, flops=10, peak=1e6)
    assert (ours["ours x"], theirs["ours x"]) == (1.0, pytest.approx(3.0))
    assert ours["tokens/s"] == pytest.approx(8192 / 1.0)  # the median of the rounds
    assert ours["MFU"] == pytest.approx(8192 * 10 / 1e6)
    assert theirs["bits per byte"] == 3.5 and theirs["peak MiB"] == 3072 and theirs["first step s, cold"] == 1.5
    assert steps_in(config, 1.0, outcome(2.0, {})) == 16  # 30 s to the first step, then 15 in the other 30


def test_time_to_equal_bits_per_byte_is_the_first_evaluation_at_or_below(tmp_path):
    theirs = Run("reference default", 0, 1.0, 20, outcome(10.0, {10: 3.0, 20: 2.5}))  # ends at 220 s
    long = Run("ours", 0, 1.0, 20, outcome(8.0, {5: 2.9, 10: 2.6, 15: 2.2, 20: 2.0}))  # 62, 102, 142, 182 s
    short = Run("ours", 0, 1 / 3, 10, outcome(4.0, {5: 2.7, 10: 2.5}, 10))  # 46, 66 s
    (row,) = at_equal_time([long, short, theirs])
    assert (row["its seconds"], row["ours by then"], row["our seconds to its"]) == (220.0, 2.0, 66.0)
    (row,) = at_equal_time([theirs, Run("ours", 0, 1.0, 20, outcome(8.0, {20: 2.6}))])
    assert row["our seconds to its"] is None and row["share of its time"] is None


def test_our_share_is_of_the_time_that_the_reference_took(tmp_path):
    class Timed:
        """A side with steps of 2 s, whose first takes 60 s, or 10 s when it was compiled before."""

        def __init__(self, name):
            self.name, self.first, self.runs = name, 60.0, []

        def run(self, flags, log):
            steps = int(next(flag for flag in flags if "num-iterations" in flag).split("=")[1])
            done = outcome(2.0, {steps: 3.0}, steps, first_step=self.first)
            self.first = 10.0
            self.runs.append(done.clock(steps))
            return done

    ours, theirs = Timed("ours"), Timed("reference default")
    config = Compare(str(_checkout(tmp_path)), batch_tokens=8192, steps=20, repeats=1, minutes=10, device_type="cpu")
    list(measure(config, 4, [ours, theirs], 8192, tmp_path))
    took = theirs.runs[-1]
    assert took == pytest.approx(550, abs=4)  # planned as 600 s with the first step's 60
    assert ours.runs[-1] == pytest.approx(0.32 * took, abs=4) and ours.runs[-1] < took / 3


def _checkout(folder):
    (folder / "scripts").mkdir()
    (folder / "scripts" / "base_train.py").touch()
    return folder


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--baseline-dir"),
        (["--baseline-dir", "."], None),
        (["--baseline-dir", "tests"], "tests has no"),
        (["--baseline-dir", ".", "--depths", "4;6"], "--depths 4;6"),
        (["--baseline-dir", ".", "--depths", "4,6,8", "--vocab-size", "1024,2048"], "--vocab-size 1024,2048"),
        (["--baseline-dir", ".", "--batch-tokens", "1000"], "--batch-tokens 1000"),
        (["--baseline-dir", ".", "--steps", "0"], "--steps 0"),
        (["--baseline-dir", ".", "--shares", ".5,.0"], "--shares .5,.0"),
        (["--baseline-dir", ".", "--shares", "third"], "--shares third"),
    ],
)
def test_bad_flags_are_named_in_one_line(flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(_checkout(tmp_path))
    if named is None:
        assert cli.parse(Compare, flags).baseline_dir == "."
        return
    with pytest.raises(SystemExit) as end:
        cli.parse(Compare, flags)
    error = capsys.readouterr().err
    assert end.value.code == 2 and named in error and error.count("\n") == 1


# --- measuring -------------------------------------------------------------------------------------------------------


def test_calls_are_timed_after_the_warmup():
    calls = []
    times = bench.time_calls(lambda: calls.append(time.sleep(0.02)), seconds=0.1, least=3, warmup=2)
    assert len(calls) == len(times) + 2 and 3 <= len(times) <= 5 and min(times) >= 0.02
    assert len(bench.time_calls(lambda: time.sleep(0.02), seconds=0, least=3)) == 3


def test_rates_count_work_over_time():
    began = time.perf_counter()
    rate = bench.gemm_rate(256, 128, 64, torch.float32, seconds=0.05)
    assert 2 * 256 * 128 * 64 / (time.perf_counter() - began) < rate < 1e15
    assert 1e7 < bench.copy_bandwidth(size=1 << 20, seconds=0.02) < 1e13


def test_a_report_is_a_record_and_a_page(tmp_path, capsys):
    page = bench.markdown_table([{"side": "ours", "x": 12345.6, "y": None}, {"side": "b", "x": 0.123456, "y": 7}])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    assert cells == [["side", "x", "y"], ["---"] * 3, ["ours", "12,346", "not measured"], ["b", "0.1235", "7"]]
    bench.write_report(tmp_path / "d4.2", {"a": 1}, page)  # a dot in the name stays
    record = json.loads((tmp_path / "d4.2.json").read_text())
    assert record["a"] == 1 and {"commit", "hardware", "versions", "date"} <= set(record)
    assert (tmp_path / "d4.2.md").read_text() == page and page in capsys.readouterr().out
