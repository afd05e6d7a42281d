"""Data-parallel replicas: whole servers, a process each, behind a front that shares the requests out among them.

A replica is `scripts.chat_web` itself on a port that only this machine reaches. Keys, origins, limits, sessions and
caches are its own; the front passes requests on, and keeps nothing.
"""

import contextlib
import hashlib
import http.client
import json
import logging
import os
import re
import select
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from nanochat.compute import usable_cores
from nanochat.serve.app import bare_app
from nanochat.serve.schema import ApiError
from nanochat.serve.service import Models

if TYPE_CHECKING:
    import flask

log = logging.getLogger(__name__)
Gone = Callable[[], bool]  # whether the client has left
VARIABLE = "NANOCHAT_REPLICA"  # a replica's number, in its environment
TRUST = {"trusted_proxy": "127.0.0.1", "trusted_proxy_headers": {"x-forwarded-for"}}  # a replica's server its front
ENDED = 502, "the replica that was to answer has ended: ask again"
PATIENCE = 3.0  # seconds that a replica has to answer what is asked of all: one that is frozen never does
LONGEST_PAUSE = 60.0  # seconds before a replica that ends time and again is started once more
TOGETHER = (("GET", "/metrics"), ("GET", "/stats"), ("POST", "/cache/invalidate"))  # asked of all


def environments(n: int, device_type: str | None) -> list[dict[str, str]]:
    """What each of n replicas finds in its environment: a GPU of its own, or its share of the cores, unless
    $OMP_NUM_THREADS says how many threads a process has. ValueError when there are fewer GPUs."""
    n_gpus = torch.cuda.device_count()  # touches none of them
    if device_type == "cpu" or not (device_type or n_gpus):
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // n))
        return [{"OMP_NUM_THREADS": threads}] * n
    if n > n_gpus:
        raise ValueError(f"--replicas {n}: each takes a GPU of its own, and here are {n_gpus}: ask for fewer")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n)))
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible.split(",")[:n]]


def end_with_front(models: Models) -> None:
    """A thread of a replica: end as by SIGTERM when the front has gone, or when an engine has died."""
    while not models.dead and not select.select([0], [], [], 1.0)[0]:  # the front holds stdin's other end
        pass
    os.kill(os.getpid(), signal.SIGTERM)


class Exchange(http.client.HTTPConnection):
    """A request at a replica and what comes back: one of those that are `open` until its `end`."""

    def __init__(self, replica: int, port: int, gone: Gone, open_: set["Exchange"], patience: float | None) -> None:
        super().__init__("127.0.0.1", port, timeout=patience)
        self.replica, self.gone, self.open, self.streams = replica, gone, open_, False
        open_.add(self)

    def ask(self, method: str, uri: str, body: bytes, headers: dict[str, str]) -> bool:
        """Have the request answered: `response` has status and header, `body` the rest unless it `streams`. False when
        the replica has begun nothing or takes longer than `patience`; ApiError 502 when it ends in the middle."""
        begun = False
        try:
            self.connect()
            begun = True
            self.request(method, uri, body or None, headers)
            self.response = self.getresponse()
            self.streams = self.response.headers.get_content_type() == "text/event-stream"
            self.body = b"" if self.streams else self.response.read()
        except (ValueError, http.client.InvalidURL) as error:
            raise ApiError(400, f"this cannot be passed on: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            if begun and self.timeout is None:
                raise ApiError(*ENDED) from error
            begun = False
        finally:
            if not self.streams:
                self.end()
        return begun

    def events(self) -> Iterator[bytes]:
        """A streamed answer as it comes, in whole events; the last is an error if the replica ends before it does."""
        rest = b""
        try:
            while piece := self.response.read1():
                whole, mark, rest = (rest + piece).rpartition(b"\n\n")
                yield whole + mark
        except (OSError, http.client.HTTPException):
            yield f"data: {json.dumps(ApiError(*ENDED).body)}\n\n".encode()

    def end(self) -> None:
        """Have done with it, however far it has come."""
        self.open.discard(self)
        if self.streams:
            self.response.close()
        self.close()


class Replicas:
    """The replicas by number: run, run again when they end, and asked; together they make `most_open` answers."""

    def __init__(self, command: Sequence[str], environments: Sequence[dict[str, str]], most_open: int) -> None:
        self.command, self.environments, self.most_open = command, environments, most_open
        self.processes: dict[int, subprocess.Popen[str]] = {}
        self.ports: dict[int, int] = {}  # of those that take requests
        self.open: set[Exchange] = set()
        self.draining, self.failure, self._lock = False, "", threading.Lock()

    @property
    def trouble(self) -> str | None:
        """Why none of them answers, if so it is."""
        return "shutting down" if self.draining else None if self.ports else "no replica is ready"

    @property
    def n_open(self) -> int:
        """Open requests, and replicas that have not ended: what a drain waits for."""
        return len(self.open) + sum(process.poll() is None for process in list(self.processes.values()))

    def start(self) -> None:
        """Start all, and wait until all take requests. ValueError when one ends before it has."""
        threading.Thread(target=self._watch, daemon=True).start()
        for replica in range(len(self.environments)):
            threading.Thread(target=self._keep, args=(replica,), daemon=True).start()
        while len(self.ports) < len(self.environments):
            time.sleep(0.05)
            if self.failure:
                raise ValueError(self.failure)

    def _keep(self, replica: int) -> None:
        """Run a replica time and again, with pauses that double until it lasts longer than the longest."""
        environment = {**os.environ, **self.environments[replica], VARIABLE: str(replica)}
        how: Any = {"env": environment, "text": True, "start_new_session": True}  # Ctrl-C is for the front
        name, was_ready, pause = f"replica {replica} with {self.environments[replica]}", False, 1.0
        while True:
            with self._lock:
                if self.draining:
                    return
                process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **how)
                self.processes[replica], begun = process, time.monotonic()
            with process:
                for line in process.stdout or ():  # until it ends
                    if address := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                        self.ports[replica], was_ready = int(address[1]), True
                        seconds = time.monotonic() - begun
                        print(f"{name}: process {process.pid} is ready after {seconds:.1f} s", flush=True)
            self.ports.pop(replica, None)
            if not was_ready and not self.draining:
                self.failure = f"{name} ended with status {process.returncode} before it was ready: see above"
            if self.draining or self.failure:
                return
            log.error("%s ended with status %d: starts again in %g s", name, process.returncode, pause)
            time.sleep(pause)
            pause = 1.0 if time.monotonic() - begun > 2 * LONGEST_PAUSE else min(LONGEST_PAUSE, 2 * pause)

    def _watch(self) -> None:
        """Hang up for clients that have: their replicas notice, and so do the threads that read."""
        while not self.draining or self.n_open:
            time.sleep(0.25)
            for exchange in [each for each in list(self.open) if each.gone()]:
                with contextlib.suppress(AttributeError, OSError):  # not connected yet, or not any more
                    exchange.sock.shutdown(socket.SHUT_RDWR)

    def drain(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Refuse new work; the replicas end what they have begun, and then themselves."""
        with self._lock:
            self.draining = True
            for process in self.processes.values():
                process.send_signal(how)

    def close(self) -> None:
        """End the replicas, whatever they do."""
        self.drain(signal.SIGKILL)
        for process in self.processes.values():
            process.wait()

    def ask(self, session: str | None, gone: Gone, patience: float | None, *message: Any) -> Iterator[Exchange]:
        """The answers of one replica after the other, as long as the caller wants more: first of who has the fewest
        open requests, or in an order of the session's own (rendezvous hashing). patience: seconds for each of them."""

        def rank(replica: int) -> Any:
            key = json.dumps([session, replica]).encode()
            return (busy[replica], replica) if session is None else hashlib.sha256(key).digest()

        left = dict(self.ports)
        while left:
            with self._lock:
                busy = Counter(each.replica for each in list(self.open))
                replica = min(left, key=rank)
                exchange = Exchange(replica, left.pop(replica), gone, self.open, patience)
            if exchange.ask(*message):
                yield exchange


def session_of(path: str, body: bytes) -> str | None:
    """The session that a request is about."""
    if path.startswith("/v1/sessions/"):
        return path.removeprefix("/v1/sessions/")
    try:
        return json.loads(body)["session_id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def together(path: str, bodies: dict[int, bytes], n: int) -> Any:
    """The answers that came of n replicas to one of TOGETHER as one: figures labelled by replica, or added up."""
    if path == "/metrics":
        from prometheus_client import Metric, generate_latest
        from prometheus_client.core import GaugeMetricFamily
        from prometheus_client.parser import text_string_to_metric_families

        up = GaugeMetricFamily("nanochat_replica_up", "Whether the replica has told its figures", labels=["replica"])
        for index in range(n):
            up.add_metric([str(index)], index in bodies)
        families: dict[str, Metric] = {up.name: up}
        for index, body in bodies.items():
            for family in text_string_to_metric_families(body.decode()):
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                whole.samples += [s._replace(labels={**s.labels, "replica": str(index)}) for s in family.samples]
        text = generate_latest(SimpleNamespace(collect=families.values))
        return text, {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
    parts = {index: json.loads(body) for index, body in bodies.items()}
    if path == "/cache/invalidate":
        return {"responses": sum(part["responses"] for part in parts.values())}
    names = [*next(iter(parts.values()))["models"]]
    models = {name: {str(i): parts[i]["models"].get(name) if i in parts else None for i in range(n)} for name in names}
    return {"uptime_seconds": max(part["uptime_seconds"] for part in parts.values()), "models": models}


def create_front(replicas: Replicas, max_body: int) -> "flask.Flask":
    """The front's application: TOGETHER is answered by all replicas, and everything else by one."""
    import flask
    from werkzeug.http import is_hop_by_hop_header

    app = bare_app(max_body)
    app.extensions["models"] = replicas

    def passed_on(headers: Any) -> dict[str, str]:
        """The fields that are not of one connection alone (RFC 9110, 7.6.1), nor said by each server for itself."""
        dropped = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
        dropped |= {"expect", "proxy-connection", "server", "date"}
        return {k: v for k, v in headers.items() if k.lower() not in dropped and not is_hop_by_hop_header(k)}

    @app.before_request
    def answer() -> Any:
        request = flask.request
        if (what := (request.method, request.path)) == ("GET", "/health"):
            return {"status": replicas.trouble or "ok"}, 503 if replicas.trouble else 200
        headers = passed_on(request.headers)
        headers |= {"X-Request-Id": flask.g.request_id, "X-Forwarded-For": request.remote_addr or ""}
        message = request.method, request.environ["REQUEST_URI"], request.get_data(cache=False), headers
        gone = request.environ.get("waitress.client_disconnected", lambda: False)
        session, bodies, exchange = session_of(request.path, message[2]), {}, None
        for exchange in replicas.ask(session, gone, PATIENCE if what in TOGETHER else None, *message):
            if what in TOGETHER and exchange.response.status == 200:
                bodies[exchange.replica] = exchange.body
            elif exchange.response.status not in ((503,) if session else (429, 503)):
                break  # but one that ends, or is full and holds no session, has begun nothing: the next may have it
        if bodies and request.method == "POST" and (missing := set(replicas.ports) - set(bodies)):
            raise ApiError(503, f"replica {min(missing)} does not answer: ask again")  # it still knows what it knew
        if bodies:
            return together(request.path, bodies, len(replicas.environments))
        if exchange is None:
            raise ApiError(503, f"{replicas.trouble or 'all ended'}: try again later", headers={"Retry-After": "5"})
        body = exchange.events() if exchange.streams else [exchange.body]
        response = flask.Response(body, exchange.response.status, passed_on(exchange.response.headers))
        response.headers["X-Replica"] = str(exchange.replica)
        response.call_on_close(exchange.end)
        return response

    return app
