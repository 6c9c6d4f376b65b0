"""Progress that remembers what it was told."""

from __future__ import annotations

from shape_moe.progress import Silent


class Notes(Silent):
    """Shows nothing and keeps every note in :attr:`said`."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)
