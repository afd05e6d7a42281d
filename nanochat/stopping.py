"""Stopping a run: Ctrl-C or SIGTERM saves the last whole step and ends, within seconds and with nothing lost.

    with stop_on_signals(run):             a signal sets run.stop_requested
        while True:
            with abandoned_on_signal(run):     a step's gradients: may be given up at any moment
                ...
            update                             changes the weights: is never interrupted

A checkpoint is always that of a whole step, so a resumed run goes on to the bit.
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

    The handler sets a flag, which the loop reads where it can stop: a signal may come in the middle of an update, when
    the weights are those of no step, and reaches each rank at another moment. Where there is nothing to lose but time
    (`abandoned_on_signal`), it stops the run right away.
    """

    def handle(signum: int, frame: Any) -> None:
        # torchrun sends its workers a signal twice, which is not the user's impatience
        if run.stop_requested and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        print0(f"\n{signal.Signals(signum).name}: saving and stopping, once more stops unsaved", file=sys.stderr)
        run.stop_requested = True
        if run.abandonable:
            run.abandonable = False  # what follows is saving
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
    """Give up what the block computes when a signal comes or memory runs out, and save the last whole step.

    The block must change neither weights nor the optimizer's state. A step of a large model takes minutes on a CPU, and
    the user who pressed Ctrl-C is waiting. Several ranks cannot stop at any moment, because the others would wait for
    them: they look for signals where all of them pass (`stop_if_requested`), and save nothing when memory runs out.
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
