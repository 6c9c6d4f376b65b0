"""The hidden states of all batches between two decoder layers: in memory, or on disk where they are many."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shape_moe.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MEMORY_LIMIT = 2**28
"""Hidden states of more bytes lie on disk."""


class HiddenStates:
    """One tensor [B, T, H] for every batch; each is taken and put once per layer.

    A generation is what lies between two layers. The next one is another file, so that a run that is killed finds the
    last one whole.

    Args:
        shapes: shape of every batch's tensor.
        dtype: of the tensors.
        folder: where files lie.
        limit: bytes beyond which tensors lie on disk.
        share: among how many streams of hidden states the limit is shared.

    Attributes:
        on_disk: whether they do.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        folder: Path,
        limit: int = MEMORY_LIMIT,
        *,
        share: int = 1,
    ) -> None:
        self._shapes, self._dtype, self._folder = list(shapes), dtype, folder
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape in shapes]
        self._offsets = [0, *accumulate(sizes)]
        self.on_disk = self._offsets[-1] * share > limit
        self._held: dict[int, torch.Tensor] = {}
        self._generation = 0

    def file(self, generation: int) -> Path:
        """Where one generation lies: what enters the decoder layer of that index."""
        return self._folder / f"entering-{generation:03d}.states"

    def take(self, number: int) -> torch.Tensor:
        """The tensor of one batch, as the last layer left it."""
        if not self.on_disk:
            return self._held[number]
        return self._read(self.file(self._generation), number)

    def put(self, number: int, tensor: torch.Tensor) -> None:
        """Keep the tensor of one batch for the next layer."""
        if not self.on_disk:
            self._held[number] = tensor.cpu()
            return
        file = self.file(self._generation + 1)
        with file.open("r+b" if file.exists() else "w+b") as stream:
            stream.seek(self._offsets[number])
            stream.write(_raw(tensor))

    def turn(self, generation: int) -> None:
        """All batches are through: what was put is what is taken from now on.

        Args:
            generation: index of the decoder layer that they enter next.
        """
        if self.on_disk:
            self.file(self._generation + 1).replace(self.file(generation))
        self._generation = generation

    def save(self) -> None:
        """Make sure that the present generation is on disk."""
        if not self.on_disk:
            with self.file(self._generation).open("wb") as stream:
                for number in range(len(self._shapes)):
                    stream.write(_raw(self._held[number]))

    def restore(self, generation: int) -> None:
        """Go on from a generation that was saved.

        Raises:
            CheckpointError: when it is not whole.
        """
        file = self.file(generation)
        if not file.is_file() or file.stat().st_size != self._offsets[-1]:
            raise CheckpointError(
                f"What an interrupted run left in {self._folder.parent} is damaged; delete that folder."
            )
        self._generation = generation
        if not self.on_disk:
            self._held = {number: self._read(file, number) for number in range(len(self._shapes))}

    def tidy(self) -> None:
        """Delete the files of other generations than the present one."""
        for file in self._folder.glob("entering-*.states"):
            if file != self.file(self._generation):
                file.unlink()

    def keep_alone(self) -> None:
        """Delete the folders of other streams that stand beside this one's, and what a run would go on from."""
        for path in self._folder.parent.iterdir():
            if path.is_dir() and path != self._folder:
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()
        self.tidy()

    def _read(self, file: Path, number: int) -> torch.Tensor:
        import torch

        begin, end = self._offsets[number], self._offsets[number + 1]
        tensor = torch.empty(self._shapes[number], dtype=self._dtype)
        with file.open("rb") as stream:
            stream.seek(begin)
            if stream.readinto(_raw(tensor)) != end - begin:
                raise CheckpointError(f"{file} is not whole; delete its folder.")
        return tensor


def _raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, those of a CPU tensor in place."""
    import torch

    return tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data
