"""Ctrl-C at a moment that leaves everything whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class DeferredInterrupt:
    """While active, the first Ctrl-C is only noted; :meth:`check` raises it. A second one goes through at once.

    Args:
        on_first: called at the first Ctrl-C, to tell the user what happens.
    """

    def __init__(self, on_first: Callable[[], None] = lambda: None) -> None:
        self.noted = False
        self._on_first = on_first
        self._before: Any = None

    def __enter__(self) -> DeferredInterrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True
        self._on_first()

    def check(self) -> None:
        """Raise the interrupt that was noted, if there was one."""
        if self.noted:
            raise KeyboardInterrupt
