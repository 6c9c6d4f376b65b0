"""Arrays of a trace by name: read from a file when they are first used, and views of parts of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.errors import CheckpointError
from shape_moe.tracing.statistics import Layout

Array = NDArray[Any]
"""float64, or int64 where a statistic counts."""


class StoredStatistics(Mapping[str, Array]):
    """Arrays of a statistics file, read on first use (Gram matrices of large models take hundreds of MB).

    Args:
        file: the file.
        layouts: axes and reduction by name.
        shape: the shape that an array of a layout must have.
    """

    def __init__(self, file: Path, layouts: Mapping[str, Layout], shape: Callable[[Layout], tuple[int, ...]]) -> None:
        self._file, self._layouts, self._shape, self._read = file, layouts, shape, dict[str, Array]()

    def __getitem__(self, name: str) -> Array:
        if name not in self._layouts:
            raise KeyError(name)
        if name not in self._read:
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(self._file, framework="numpy") as tensors:
                    found = tensors.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self._file} is missing or damaged.") from error
            wanted = self._shape(self._layouts[name])
            if found.shape != wanted or not np.isfinite(found).all():
                raise CheckpointError(
                    f"{self._file} is damaged: {name} must be finite numbers of shape {wanted}, not {found.shape}."
                )
            self._read[name] = found
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layouts)

    def __len__(self) -> int:
        return len(self._layouts)


class PartOf(Mapping[str, Array]):
    """The same part of every array.

    Args:
        whole: the arrays.
        part: gives the part of one.
    """

    def __init__(self, whole: Mapping[str, Array], part: Callable[[Array], Array]) -> None:
        self._whole, self._part = whole, part

    def __getitem__(self, name: str) -> Array:
        return self._part(self._whole[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)
