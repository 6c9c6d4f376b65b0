"""The end of a process whose work is done."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

_UNSAFE = "vllm"
"""Its libraries leave threads running that their destructors do not expect: a process can abort (exit code -6) on its
way out, after everything has been written."""


def leave(code: int) -> NoReturn:
    """End the process with an exit code that does not depend on what native libraries do on the way out.

    Where no vLLM is loaded this is ``sys.exit``. Else what Python has registered for its end still runs (engines and
    other children are ended there, logs are flushed), and destructors of native libraries do not.

    Args:
        code: the exit code.
    """
    if _UNSAFE not in sys.modules:
        sys.exit(code)
    try:
        atexit._run_exitfuncs()  # noqa: SLF001  # what sys.exit would run; there is no public name
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or 1  # nobody reads the output any more
    os._exit(code)
