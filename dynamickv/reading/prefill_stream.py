"""A prefill that tells its progress while it runs, and that nobody need wait for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator

from dynamickv.record.events import LayerKept, Progress
from dynamickv.records import Prefill


class Cancelled(Exception):
    """Raised inside the prefill when nobody waits for it any more."""


def prefill_stream(
    total: int,
    run: Callable[[Callable[[int], None], Callable[[LayerKept], None]], Prefill],
    stop: Callable[[], bool],
) -> Generator[Progress | LayerKept, None, Prefill | None]:
    """Run a prefill in a thread, so that its progress can be told and it can be stopped.

    Args:
        total: layers that will be told.
        run: reads the prompt; calls the first of what it is given with the number of layers done,
            and the second with anything else that is to be told.
        stop: asked after every layer.

    Returns:
        None when it was stopped.
    """
    messages: queue.SimpleQueue[int | LayerKept | Prefill | BaseException] = queue.SimpleQueue()
    abandoned = threading.Event()

    def on_layer(layer: int) -> None:
        if abandoned.is_set() or stop():
            raise Cancelled
        messages.put(layer)

    def work() -> None:
        try:
            messages.put(run(on_layer, messages.put))
        except Cancelled:  # the one just caught would keep the prefill's tensors alive
            messages.put(Cancelled())
        except BaseException as error:  # handed to the reader, which raises it
            messages.put(error)

    yield Progress("prefill", 0, total)
    worker = threading.Thread(target=work, name="prefill", daemon=True)
    worker.start()
    try:
        while True:
            message = messages.get()
            if isinstance(message, int):
                yield Progress("prefill", message, total)
            elif isinstance(message, LayerKept):
                yield message
            elif isinstance(message, Prefill):
                return None if stop() else message
            elif isinstance(message, Cancelled):
                return None
            else:
                raise message
    finally:
        abandoned.set()
        worker.join()
