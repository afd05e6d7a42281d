"""Which requests the next step works on. Pure Python: what a scheduler decides needs no tensors.

A request waits, is read (prefill, in chunks), continued token by token (decode), and is done. The running ones own
slots of the cache: request i of `running` has slot i. When the cache is full the one that came last gives up its slot
and waits again; what it had read is read anew later.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

from nanochat.request import Request

HEAD_START = 64  # a level of priority overtakes at most so many requests that came before


class Slots(Protocol):
    """What a scheduler asks of the cache. Slot i belongs to request i of those that run."""

    def fits(self, sizes: Sequence[int]) -> bool:
        """Whether sequences of so many tokens have room at the same time."""

    def attach(self, request: Request, running: Sequence[Request], twin: Request | None) -> int:
        """Begin `request` in its slot, after those of `running`; how many of its first tokens need not be read, being
        known from before, or from the running `twin`, which has read the same prompt."""

    def move(self, source: int, target: int, size: int) -> None:
        """Give the first `size` positions of slot `source` to `target`."""


class Scheduler:
    """First come first served, but for priorities; every step continues all that decode and gives what is left of
    its token budget to those that are still read, the first first. Where none decodes and would wait for it, a step may
    take twice the budget, but for a single request. Nothing starves: a later request overtakes an earlier one by
    HEAD_START places at most, and the first of all never gives up its slot.
    """

    def __init__(self, slots: Slots, max_running: int, step_tokens: int) -> None:
        assert step_tokens > max_running >= 1, "prefill must get a share of every step"
        self.slots, self.max_running, self.step_tokens = slots, max_running, step_tokens
        self.waiting: list[Request] = []  # in the order of service
        self.running: list[Request] = []
        self.n_preempted = 0
        self._arrivals = itertools.count()

    def add(self, request: Request) -> None:
        """Queue a request."""
        arrival = next(self._arrivals)
        request.order = arrival - HEAD_START * request.priority, arrival
        self._wait(request)

    def schedule(self) -> tuple[list[Request], list[tuple[Request, int]]]:
        """What to do next: requests to continue by one token, and requests to read so many tokens of."""
        full = False
        while not self.slots.fits([request.size for request in self.running]):
            self._preempt(max(self.running, key=lambda request: request.order))
            full = True
        decode = [request for request in self.running if request.n_pending == 1]
        budget = self.step_tokens - len(decode) if decode else 2 * self.step_tokens
        prefill = []
        for request in sorted(self.running, key=lambda request: request.order):
            if request.n_pending > 1 and budget:
                prefill.append((request, min(request.n_pending, self.step_tokens, budget)))
                budget -= prefill[-1][1]
        for request, twin in () if full else self._admissible():
            if not budget or not self.slots.fits([r.size for r in (*self.running, request)]):
                break  # those behind it wait with it: small ones that slip past would starve a large one
            self._admit(request, twin)
            n = min(request.n_pending, self.step_tokens, budget)
            budget -= n
            if request.n_pending == 1:
                decode.append(request)
            else:
                prefill.append((request, n))
        for request, _ in prefill:
            request.state = "prefill"
        for request in decode:
            request.state = "decode"
        return decode, prefill

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is; the last running one moves into its slot."""
        if request.state == "waiting":
            self.waiting.remove(request)
        elif request.state != "done":
            self._vacate(request)
        request.state = "done"

    def _wait(self, request: Request) -> None:
        request.state = "waiting"
        bisect.insort(self.waiting, request, key=lambda request: request.order)

    def _admissible(self) -> Iterator[tuple[Request, Request | None]]:
        """Waiting requests in order, while slots are free, each with a running one that has read the same prompt, as
        samples of one prompt share what the first has read; those for whom one is just reading it wait for that."""
        for request in list(self.waiting) if len(self.running) < self.max_running else ():
            if len(self.running) == self.max_running:
                return
            same = (r for r in self.running if r.tokens is request.tokens or r.tokens == request.tokens)
            twin = max(same, key=lambda twin: twin.n_read, default=None)
            if twin is None or twin.n_read >= len(request.tokens) - 1:
                yield request, twin

    def _admit(self, request: Request, twin: Request | None) -> None:
        self.waiting.remove(request)
        request.slot, request.state = len(self.running), "prefill"
        request.n_read = request.n_reused = self.slots.attach(request, self.running, twin)
        assert 0 <= request.n_read < request.size
        self.running.append(request)

    def _preempt(self, request: Request) -> None:
        assert len(self.running) > 1, "a request alone fits, or it would not have been added"
        self.n_preempted += 1
        self._vacate(request)
        self._wait(request)

    def _vacate(self, request: Request) -> None:
        last = self.running.pop()
        if last is not request:
            self.slots.move(last.slot, request.slot, last.n_read)
            self.running[request.slot], last.slot = last, request.slot
        request.n_read = 0
