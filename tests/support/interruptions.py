"""Work that is interrupted half-way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any


def interrupt() -> None:
    """Stop at once."""
    raise KeyboardInterrupt


def press_ctrl_c() -> None:
    """Ask the process to stop, as a user does."""
    os.kill(os.getpid(), signal.SIGINT)


def stopped_after(
    calls: int, function: Callable[..., Any], stop: Callable[[], None] = interrupt
) -> tuple[Callable[..., Any], list[tuple[Any, ...]]]:
    """A function that is stopped at the call after so many, and the arguments of the calls it went through with."""
    done: list[tuple[Any, ...]] = []

    def stopped(*arguments: Any, **more: Any) -> Any:
        if len(done) == calls:
            stop()
        done.append(arguments)
        return function(*arguments, **more)

    return stopped, done
