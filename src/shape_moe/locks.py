"""Locks between processes: a file that one of them holds, and that disappears when it is done."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from shape_moe.errors import ShapeMoeError

_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def take_lock(file: Path, *, wait: bool = False) -> int | None:
    """Take the lock that a file stands for, which is made where it is missing.

    A holder deletes its file, so what was locked may have been deleted, or replaced by another process's, between the
    opening and the lock: only a lock on the file that has the name now counts.

    Args:
        file: the lock file; its folder must be there.
        wait: wait for the process that holds the lock.

    Returns:
        A descriptor, open for writing, that holds the lock until it is closed; None where another process has it.

    Raises:
        ShapeMoeError: when the file system knows no locks.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if not _lock(descriptor, file, wait=wait):
                os.close(descriptor)
                return None
            if _is_named(descriptor, file):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def drop_lock(file: Path, descriptor: int) -> None:
    """Delete a lock's file while it is still held, then let go of it."""
    file.unlink(missing_ok=True)
    os.close(descriptor)


def lock_of(place: Path) -> Path:
    """The file whose lock keeps two runs out of one output."""
    return place.with_name(f".{place.name}.lock")


def drop_left_lock(file: Path) -> None:
    """Delete the lock of a run that was killed when all was done."""
    if file.exists() and (lock := take_lock(file)) is not None:
        drop_lock(file, lock)


def _lock(descriptor: int, file: Path, *, wait: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # no advisory locks on this platform
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise ShapeMoeError(
            f"The file system of {file.parent} has no locks ({error.strerror}), so two runs could not be kept apart; "
            "choose an output on another disk."
        ) from error
    return True


def _is_named(descriptor: int, file: Path) -> bool:
    try:
        named = file.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)
