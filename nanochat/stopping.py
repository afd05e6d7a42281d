"""Stopping a run: Ctrl-C or SIGTERM saves the last whole step and ends, within seconds and with nothing lost.

    with stop_on_signals(run):             a signal sets run.stop_requested
        while True:
            with abandoned_on_signal(run):     a step's gradients: may be abandoned at any moment
                ...
            update                             changes the weights: is never interrupted

A checkpoint always holds a whole step, so a resumed run continues bit for bit.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch

from nanochat.common import print0
from nanochat.run import Run


@contextlib.contextmanager
def stop_on_signals(run: Run) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM ask the run to save and stop; a second one ends it without saving.

    The handler sets a flag, and the loop reads it where stopping is safe. In the middle of an update it is not: some
    weights have changed and others have not. Inside `abandoned_on_signal` no weight changes, so the handler stops the
    run right away.
    """

    def handle(signum: int, frame: Any) -> None:
        # torchrun sends each signal to its workers twice, so there a second one does not mean a second Ctrl-C.
        if run.stop_requested and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        print0(f"\n{signal.Signals(signum).name}: saving and stopping, once more stops unsaved", file=sys.stderr)
        run.stop_requested = True
        if run.abandonable:
            run.abandonable = False  # the run is saved next, and must not be interrupted again
            raise KeyboardInterrupt

    previous = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def stop_if_requested(run: Run) -> None:
    """Save and raise KeyboardInterrupt if a signal has reached any rank. Every rank calls this at the same places.

    A signal reaches ranks at different times. They agree here, and so stop at the same step.
    """
    if run.compute.any_rank(run.stop_requested):
        run.save()
        raise KeyboardInterrupt


@contextlib.contextmanager
def abandoned_on_signal(run: Run) -> Iterator[None]:
    """Abandon the block on a signal, or when memory runs out, and save the last whole step.

    The block must change neither weights nor the optimizer's state. A step of a large model takes minutes on a CPU, and
    the user who pressed Ctrl-C is waiting. With several ranks, one that stopped at once would leave the others waiting
    for it. So they look for signals only where all of them pass (`stop_if_requested`), and save nothing when memory
    runs out.
    """
    stop_if_requested(run)
    alone = run.compute.world_size == 1
    run.abandonable = alone
    try:
        yield
    except (KeyboardInterrupt, torch.OutOfMemoryError):
        run.abandonable = False
        if alone:
            run.save()
        raise
    finally:
        run.abandonable = False
