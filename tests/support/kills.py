"""A process that is killed between two steps of its work on files."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from shape_moe import workspace

_KILLED = 99
_STEPS = ("rename", "replace", "unlink", "rmdir")


def killed_before(step: int, work: Callable[[], object]) -> bool:
    """Do work in a child process that dies, without any clean-up, before its ``step``-th change of names.

    Returns:
        Whether it died; False when it got to its end.
    """
    child = os.fork()
    if child == 0:
        try:
            _die_before(step)
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001  # the child must not return
            import traceback

            traceback.print_exc()
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, _KILLED), "the work failed by itself"
    return code == _KILLED


def _die_before(step: int) -> None:
    done = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal done
            if done == step:
                os._exit(_KILLED)
            done += 1
            return function(*arguments, **more)

        return call

    for name in _STEPS:
        setattr(os, name, counted(getattr(os, name)))
    workspace.exchange = counted(workspace.exchange)  # type: ignore[assignment]  # for the child alone
