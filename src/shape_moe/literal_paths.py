"""Paths that are taken as they are, for libraries that read patterns, addresses or chains into them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from shape_moe.errors import ServingError

_PLAIN = re.compile(r"[\w./+@,=-]+", re.ASCII)


def expand_home(name: str) -> Path:
    """A path as a file of settings names it: ``~/...`` is the user's own folder, anything else is taken as it is."""
    path = Path(name)
    return path.expanduser() if path.parts[:1] == ("~",) else path


def check_plain(path: str, reader: str) -> None:
    """Refuse a folder whose name another program would read as a pattern, and so might load another folder's files.

    Raises:
        ServingError: when the name holds ``*``, ``?`` or ``[``.
    """
    if re.search(r"[*?\[]", str(Path(path).absolute())) and Path(path).exists():
        raise ServingError(
            f"{reader} reads the name {path} as a pattern and may load another folder's files; rename the folder, or "
            "give a link to it whose name holds no *, ? and [."
        )


@contextmanager
def plain_model(model: str | PathLike[str]) -> Iterator[str]:
    """A model as vLLM can be given it: a folder by a plain name, a hub id as it is."""
    if not Path(model).is_dir():
        yield str(model)
        return
    with plain_name(Path(model)) as name:
        yield str(model) if name == Path(model).absolute() else str(name)


@contextmanager
def plain_name(path: Path) -> Iterator[Path]:
    """Another name of a file or folder, without any character that a library could read as more than a name.

    A name that is plain is given back as it is. Any other gets a link in a temporary folder, which goes at the end:
    what reads by the name later must be kept inside the block.
    """
    place = path.absolute()
    if _PLAIN.fullmatch(str(place)):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="shape-moe-") as folder:
        link = Path(folder) / ("link" + (place.suffix if _PLAIN.fullmatch(place.suffix) else ""))
        link.symlink_to(place, target_is_directory=place.is_dir())
        yield link
