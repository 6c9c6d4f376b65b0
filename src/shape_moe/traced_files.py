"""The weights that a trace was made from, so that a write after it notices when they are others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shape_moe.architectures.gguf_file import part_files
from shape_moe.source_files import SourceFile, changed_file, changed_since, describe_file, sha256

CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TracedFiles:
    """A model's weights and configuration as they were when it was traced.

    Attributes:
        place: sha256 of the folder's absolute path: it tells the same folder from a copy and names neither.
        files: what is known of each file, by name.
    """

    place: str
    files: dict[str, SourceFile]

    def changed(self, folder: Path) -> str | None:
        """What has changed where the model was traced; None where nothing has, or where this is another folder."""
        if self.place != _place(folder):
            return None
        return changed_file(self.files, traced_files(folder).files)

    def touched(self, folder: Path) -> str | None:
        """As :meth:`changed`, while the model is traced: by what the file system says alone."""
        folder = folder.absolute()
        parent = folder.parent if folder.is_file() else folder
        named = {str(parent / name): file for name, file in self.files.items()}
        return changed_since(named, _weights(folder))

    def difference_of_copy(self, folder: Path) -> str | None:
        """The first file of a copy that is laid out as the traced one is and holds something else."""
        copy = traced_files(folder)
        for name, known in self.files.items():
            found = copy.files.get(name)
            if name != CONFIG and found is not None and known.difference_of_copies(found) == "content":
                return name
        return None

    def uncompared(self, folder: Path) -> str | None:
        """What of a copy could not be compared with the traced model, as a sentence; None where all could."""
        copy = traced_files(folder)
        if self.place == copy.place:
            return None
        weights = {name for name in {*self.files, *copy.files} if name not in (CONFIG, _INDEX)}
        if any(
            name not in self.files or name not in copy.files or self.files[name].difference_of_copies(copy.files[name])
            for name in weights
        ):
            return "its routers are equal; other weights lie in other files and could not be compared."
        if any(self.files[name].digest.startswith("sampled:") for name in weights):
            return (
                "its files have the same sizes and headers, and samples of them are equal; the rest was not compared."
            )
        return None


def traced_files(folder: Path) -> TracedFiles:
    """Record the weights and the configuration of a model's folder, or the files of a GGUF model.

    Raises:
        OSError: when a file cannot be read.
    """
    return TracedFiles(_place(folder), {file.name: describe_file(file) for file in _weights(folder)})


def _weights(folder: Path) -> Iterator[Path]:
    if folder.is_file():
        yield from part_files(folder)
        return
    for file in sorted(folder.iterdir()):
        if file.is_file() and (file.suffix == ".safetensors" or file.name in (CONFIG, _INDEX)):
            yield file


def _place(folder: Path) -> str:
    return sha256(os.fsencode(folder.resolve()))
