"""A model's chat template (Jinja), rendered by a process of its own with little memory and time.

Jinja's sandbox keeps a template from everything but the messages, but not from making gigabytes of forty characters, in
a list of the same list twice, forty times over, say: that only the system refuses.
"""

import contextlib
import datetime
import json
import resource
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

_SECONDS = 2.0  # of processor time
_LONGEST, _MEMORY = 1 << 22, 1 << 29  # characters of the result; bytes of the process
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from nanochat.hf.template import serve; serve(float(sys.argv[2]))"
)


class Template:
    """A template's text, ready to be rendered; ValueError when it is broken."""

    def __init__(self, source: str) -> None:
        self._source, self._lock = source, threading.Lock()
        self._start()

    def _start(self) -> None:
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-c", _START, str(root), str(_SECONDS)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process: Any = subprocess.Popen(command, **pipes, text=True, encoding="ascii", start_new_session=True)
        self._end = weakref.finalize(self, _end, self._process)
        reply = self._ask(self._source)
        if "refused" in reply:
            self._end()
            raise ValueError(f"the model's chat template is broken: {reply['refused']}")

    def _ask(self, question: Any) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{json.dumps(question)}\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"refused": f"it ran for more than {_SECONDS:g} s, or died", "died": True}

    def render(self, **variables: Any) -> str:
        """The text; ValueError when the template fails, refuses, or takes more than its share of time or memory."""
        with self._lock:
            if not self._end.alive:
                self._start()
            reply = self._ask(variables)
            if "died" in reply:
                self._end()
        if "refused" in reply:
            raise ValueError(f"the model's chat template refuses this conversation: {reply['refused']}")
        return reply["text"]


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def serve(seconds: float) -> None:
    """The process: reads a template, then variables, and writes what becomes of them, a line of JSON each. A timer of
    the system ends it in the middle of anything that takes more than so many seconds."""
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401  (not in a template's time)

    template: Any = None
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            if template is None:
                template, reply = _compile(json.loads(line)), {}
            else:
                reply = {"text": _render(template, json.loads(line))}
        except Exception as error:  # whatever a template comes upon, memory that ends among it
            reply = {"refused": str(error) or type(error).__name__}
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        print(json.dumps(reply), flush=True)


def _compile(source: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **layout)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals = {"range": environment.globals["range"], "namespace": environment.globals["namespace"]}
    environment.globals |= {"dict": dict, "raise_exception": refuse}
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern[:100])
    return environment.from_string(source)


def _render(template: Any, variables: dict[str, Any]) -> str:
    pieces, length = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > _LONGEST:
            raise OverflowError(f"it made more than {_LONGEST} characters")
    return "".join(pieces)
