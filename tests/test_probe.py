"""How a probe judges a kernel: candidates that are right, wrong in value, wrong in gradient, and broken."""

import pytest
import torch

from nanochat.compute import kernel_agrees


def raises(x):
    raise RuntimeError("out of resource: shared memory\nand more lines")


JUDGED = [
    (lambda x: x.sin(), None),
    (lambda x: x.sin() * 1.001, "wrong results"),
    (lambda x: x.sin() + (x - x.detach()), "wrong results"),  # right value, wrong gradient
    (lambda x: x.sin() * float("nan"), "wrong results"),
    (lambda x: x.sin().detach(), "does not require grad"),
    (raises, "out of resource: shared memory"),
]


@pytest.mark.parametrize("form, reason", JUDGED)
def test_a_probe_passes_only_what_agrees_forward_and_backward(form, reason, capsys):
    inputs = [torch.linspace(-2, 2, 50)]
    with torch.inference_mode():
        assert kernel_agrees("candidate", form, torch.sin, inputs) == (reason is None)
    printed = capsys.readouterr().out
    assert (reason in printed and printed.count("\n") == 1) if reason else not printed
