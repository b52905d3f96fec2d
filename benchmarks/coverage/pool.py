"""Work through names in worker processes: a crash or a hang costs one name, not the run."""

from __future__ import annotations

import json
import os
import queue
import selectors
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import Any

LIMIT = 120.0
"""Seconds for one name, the worker's start included."""


class Worker:
    """A process that reads a name per line and answers with a line of JSON."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.command, self.environment = command, environment
        self.process: subprocess.Popen[str] | None = None

    def ask(self, name: str, limit: float) -> dict[str, Any]:
        """The answer; {"crash": what happened} where there is none."""
        process = self.process or subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **self.environment},
        )
        self.process = process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(name + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return self._gone("the process could not start")
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(limit):
                return self._gone(f"no answer within {limit:.0f} s")
        line = process.stdout.readline()
        if not line:
            return self._gone("the process ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _gone(self, what: str) -> dict[str, Any]:
        process = self.process
        assert process is not None
        code = process.poll()
        self.close()
        if code is not None and code < 0:
            what = f"{what} with {signal.Signals(-code).name}"
        return {"crash": what}

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = None


def work(
    command: Sequence[str],
    names: Sequence[str],
    record: Callable[[str, dict[str, Any]], None],
    workers: int,
    environment: dict[str, str] | None = None,
    limit: float = LIMIT,
) -> None:
    """Ask for every name once; `record` is called with each answer as it comes, one at a time."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    lock = threading.Lock()

    def serve() -> None:
        worker = Worker(command, environment or {})
        try:
            while True:
                try:
                    name = waiting.get_nowait()
                except queue.Empty:
                    return
                answer = worker.ask(name, limit)
                with lock:
                    record(name, answer)
        finally:
            worker.close()

    threads = [threading.Thread(target=serve) for _ in range(max(1, min(workers, len(names))))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
