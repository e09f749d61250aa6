"""Long calls of compiled code, run in a thread so that Python's signal handlers run meanwhile.

Python calls a handler in the main thread, between two instructions: a call that waits in compiled code delays it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def call_in_thread(function: Callable[[], T]) -> T:
    """Return the function's value, or raise its error; signals are handled while it runs.

    The thread is a daemon: if a handler ends the process, nothing waits for the call.
    """
    outcome: Future[T] = Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # raised in the calling thread
            outcome.set_exception(error)

    thread = Thread(target=call, daemon=True)
    thread.start()
    thread.join()  # Python runs signal handlers meanwhile
    return outcome.result()
