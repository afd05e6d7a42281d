"""The scheduler against its promises, over random traces. The cache is a stand-in that knows what each slot holds."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nanochat.kv_cache import BLOCK
from nanochat.scheduler import Request, Scheduler


class Cache:
    """Rows as in a rectangle: as many as there are sequences, as long as the longest, rounded up to 16.

    It checks that rows are copied when and where they hold what the scheduler thinks. Every request finds `known`
    blocks of itself in the prefix cache.
    """

    def __init__(self, capacity):
        self.capacity = capacity
        self.known = 0
        self.held = {}  # tokens that each row holds
        self.prefixes = self

    def fits(self, sizes):
        return len(sizes) * math.ceil(max(sizes, default=0) / 16) * 16 <= self.capacity

    def reserve(self, n_rows, size):
        assert self.fits([size] * n_rows)

    def can_truncate(self, read, length):
        return True

    def load(self, row, tokens):
        n = min(self.known, len(tokens) // BLOCK)
        self.held[row] = BLOCK * n
        return [None] * n

    def copy_row(self, source, target, length):
        assert self.held[source] >= length
        self.held[target] = length

    def clear_row(self, row, length):
        pass


def schedule(scheduler):
    """The next step's work: requests that decode, and those in prefill with the tokens that they read."""
    work = scheduler.schedule()
    decode = [request for request, _ in work if request.state == "decode"]
    assert all(n == 1 for request, n in work if request in decode)
    return decode, [(request, n) for request, n in work if request not in decode]


class Trace(RuleBasedStateMachine):
    """Requests come, are aborted, grow, are preempted; after every step all that the scheduler promises holds."""

    n_steps = 0

    @initialize(
        max_running=st.integers(1, 6),
        share=st.integers(1, 30),
        capacity=st.sampled_from([64, 96, 200, 1000]),
        seed=st.randoms(),
    )
    def begin(self, max_running, share, capacity, seed):
        self.cache, self.random = Cache(capacity), seed
        self.scheduler = Scheduler(self.cache, max_running, max_running + share)
        self.alive, self.targets, self.n_preempted, self.waits = [], {}, 0, {}

    @rule(
        n=st.integers(1, 60),
        new=st.integers(1, 20),
        twins=st.integers(1, 3),
    )
    def add(self, n, new, twins):
        tokens = [self.random.randrange(3) for _ in range(n)]
        for sample in range(twins):
            request = Request(tokens, sample=sample)
            if self.cache.fits([n + new]):
                self.scheduler.add(request)
                self.alive.append(request)
                self.targets[request] = new

    @precondition(lambda self: self.alive)
    @rule()
    def abort(self):
        request = self.random.choice(self.alive)
        self.alive.remove(request)
        self.scheduler.remove(request)
        assert request.state == "done"
        assert request not in self.scheduler.waiting and request not in self.scheduler.running

    @rule(known=st.integers(0, 3))
    def learn(self, known):
        self.cache.known = known

    @rule(times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times):
            self.work()

    def work(self):
        Trace.n_steps += 1
        scheduler, before = self.scheduler, list(self.scheduler.running)
        progress = {request: (request.n_read, len(request.output)) for request in before}
        preempted = scheduler.n_preempted
        decode, prefill = schedule(scheduler)
        chosen = [*decode, *(request for request, _ in prefill)]
        assert len(chosen) == len(set(chosen)) and set(chosen) <= set(scheduler.running)
        # twice the budget where no request waits for its next token, but for a single one
        budget = scheduler.step_tokens * (1 if any(request in before for request in decode) else 2)
        assert len(decode) + sum(n for _, n in prefill) <= budget
        assert all(n <= scheduler.step_tokens for _, n in prefill)
        assert all(request.n_pending == 1 and request.state == "decode" for request in decode)
        assert all(1 <= n <= request.n_pending and request.state == "prefill" for request, n in prefill)
        # all that can be continued is, and what is left of the budget is used
        assert {request for request in scheduler.running if request.n_pending == 1} == set(decode)
        unread = [request for request in scheduler.running if request not in chosen]
        if unread:
            assert len(decode) + sum(n for _, n in prefill) == budget
            assert max(r.arrival for r, _ in prefill) < min(r.arrival for r in unread)
        if scheduler.running:
            assert min(scheduler.running, key=lambda request: request.arrival) in chosen
        # whoever was given up came after all that stayed, and whoever came in did so before those that still wait
        given_up = [request for request in before if request in scheduler.waiting]
        assert scheduler.n_preempted - preempted >= len(given_up)
        stayed = [request for request in before if request in scheduler.running]
        assert all(a.arrival < b.arrival for a in stayed for b in given_up)
        reading = [r.tokens for r in scheduler.running if r.n_read < len(r.tokens) - 1 or r not in before]
        new = [request for request in scheduler.running if request not in before]
        passed = [w for w in scheduler.waiting for r in new if w.arrival < r.arrival and w.tokens not in reading]
        assert not passed
        for request in decode:
            self.read(request, 1)
        for request, n in prefill:
            self.read(request, n)
        for request in [r for r in chosen if not r.n_pending]:
            request.output.append(7)
            if len(request.output) == self.targets[request]:
                scheduler.remove(request)
                self.alive.remove(request)
        for request, (n_read, n_output) in progress.items():
            moved = request.n_read > n_read or len(request.output) > n_output
            assert moved or request in given_up or request not in chosen

    def read(self, request, n):
        assert self.scheduler.running[request.row] is request
        assert self.cache.held[request.row] == request.n_read
        request.n_read += n
        self.cache.held[request.row] = request.n_read

    @invariant()
    def places(self):
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        assert sorted(map(id, self.alive)) == sorted(map(id, scheduler.waiting + scheduler.running))
        assert len(scheduler.running) <= scheduler.max_running
        assert all(request.state == "waiting" and request.n_read == 0 for request in scheduler.waiting)
        orders = [request.arrival for request in scheduler.waiting]
        assert orders == sorted(orders)

    def teardown(self):
        """When nothing more comes, everything ends: each step brings the first of all a token, and never loses it."""
        if hasattr(self, "scheduler"):
            longest = sum(len(request.tokens) + self.targets[request] for request in self.alive)
            for _ in range(longest * (1 + len(self.alive))):
                if not self.alive:
                    break
                self.work()
            assert not self.alive and not self.scheduler.running and not self.scheduler.waiting


def test_ten_thousand_random_steps():
    run_state_machine_as_test(Trace, settings=settings(max_examples=160, stateful_step_count=80, deadline=None))
    assert Trace.n_steps >= 10_000


def drain(scheduler, targets):
    """The order in which requests end."""
    ended = []
    while scheduler.waiting or scheduler.running:
        for request, n in scheduler.schedule():
            request.n_read += n
            if not request.n_pending:
                request.output.append(1)
                if len(request.output) >= targets.get(request, 1):
                    scheduler.remove(request)
                    ended.append(request)
    return ended


def scheduler(max_running=1, step_tokens=64, capacity=10**6):
    cache = Cache(capacity)
    cache.copy_row = lambda source, target, length: None
    cache.clear_row = lambda row, length: None
    return Scheduler(cache, max_running, step_tokens)


def test_the_first_to_come_is_served_first():
    queue = scheduler()
    requests = [Request([i]) for i in range(9)]
    for request in requests:
        queue.add(request)
    assert drain(queue, {}) == requests


def test_a_prompt_is_read_in_chunks_while_others_go_on():
    queue = scheduler(max_running=3, step_tokens=10)
    quick, long = Request([1]), Request(list(range(40)))
    queue.add(quick)
    queue.add(long)
    decoded, read = 0, []
    while long.n_read < 40:
        decode, prefill = schedule(queue)
        decoded += quick in decode
        for request in decode:
            request.n_read += 1
            request.output.append(1)
        for request, n in prefill:
            request.n_read += n
            read.append(n)
    assert read == [10, 9, 9, 9, 3] and decoded == 5


def test_a_crowd_that_comes_at_once_is_read_at_once():
    """Where nothing is continued that would wait for it; what is then continued has the budget to itself."""
    queue = scheduler(max_running=10, step_tokens=64)
    crowd = [Request([i] * 12) for i in range(10)]
    for request in crowd:
        queue.add(request)
    decode, prefill = schedule(queue)
    assert (decode, prefill) == ([], [(request, 12) for request in crowd])
    for request in crowd[:2]:
        request.n_read, request.output = 12, [1]
    for request in crowd[2:]:
        request.n_read = 2
    decode, prefill = schedule(queue)
    assert decode == crowd[:2] and [n for _, n in prefill] == [10, 10, 10, 10, 10, 10, 2]


def test_samples_of_a_prompt_wait_for_its_reading_and_others_do_not():
    queue = scheduler(max_running=8, step_tokens=20)
    prompt, other = list(range(50)), Request([1, 2, 3])
    samples = [Request(prompt, sample=i) for i in range(4)]
    for request in [*samples, other]:
        queue.add(request)
    total, waited = 0, None
    while any(not request.output for request in samples):
        for request, n in queue.schedule():
            request.n_read += n
            total += n if request in samples and not request.output else 0
            if not request.n_pending:
                request.output.append(1)
        if samples[0].n_read < 49:
            assert [r for r in queue.running if r in samples] == [samples[0]]
        waited = samples[1].arrival if other in queue.running and not samples[1].output else waited
    assert waited is not None  # it went past the samples
    assert total == 50 + 3  # the prompt once, and its last token for each further sample


def test_the_last_to_come_gives_way_and_is_first_to_return():
    queue = scheduler(max_running=4, step_tokens=50, capacity=96)
    requests = [Request(list(range(i, i + 20))) for i in range(3)]  # three of 32 slots fit, two of 48
    for request in requests:
        queue.add(request)
    ended = drain(queue, dict.fromkeys(requests, 20))
    assert ended == requests and queue.n_preempted >= 1


def test_a_request_too_large_for_its_neighbours_waits_and_is_not_overtaken():
    queue = scheduler(max_running=4, step_tokens=100, capacity=128)
    first, large, small = Request([1] * 30), Request([2] * 100), Request([3] * 4)
    for request in (first, large, small):
        queue.add(request)
    assert drain(queue, {first: 5, large: 2, small: 1}) == [first, large, small]


@pytest.mark.parametrize("bad", [{"tokens": []}, {"max_tokens": 0}, {"temperature": -1}, {"temperature": math.inf}])
def test_requests_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError):
        Request(**{"tokens": [1], **bad})
