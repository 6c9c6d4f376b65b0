"""Where a pruned model goes: a folder, or one GGUF file with a folder of what it was made by beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from shape_moe.architectures.gguf_file import is_gguf
from shape_moe.architectures.snapshot import check_named
from shape_moe.errors import UsageError
from shape_moe.locks import drop_left_lock, lock_of
from shape_moe.pruning.gguf_slices import MODEL_FILE
from shape_moe.source_files import is_one_of
from shape_moe.workspace import (
    Apart,
    Workspace,
    check_output,
    check_output_file,
    is_left_to_finish,
    real_place,
)

REJECTED = ".rejected"
_SUFFIX = ".gguf"
_BESIDE = ".shape"


@dataclass(frozen=True)
class PrunedPlace:
    """The place of a pruned model.

    Attributes:
        folder: the result's folder: the model, or what a GGUF file was made by (trace, selection, judgement, card).
        file: the GGUF file, None for a model that is a folder.
    """

    folder: Path
    file: Path | None = None

    def check(self, inputs: Sequence[str | PathLike[str]], *, force: bool, rejects: bool) -> None:
        """Refuse a place where something lies already, or that touches an input.

        Args:
            inputs: what the job reads.
            force: replace an earlier result.
            rejects: whether the model may come to stand beside, under the name of a rejected one.

        Raises:
            UsageError: see :func:`shape_moe.workspace.check_output`.
        """
        try:
            for suffix in self.suffixes(rejects=rejects):
                self._check_name(suffix, inputs, force=force)
        except UsageError:
            drop_left_lock(lock_of(self.folder))
            raise

    def _check_name(self, suffix: str, inputs: Sequence[str | PathLike[str]], *, force: bool) -> None:
        folder, file = self.folder.with_name(self.folder.name + suffix), self.files.get(suffix)
        replaces = force or is_left_to_finish(folder)
        check_output(folder, force=replaces, inputs=inputs)
        if file is None:
            return
        check_output_file(file, force=replaces)
        if is_one_of(file, inputs):
            raise UsageError(f"The output {file} is an input of this command; choose another output.")

    @staticmethod
    def suffixes(*, rejects: bool) -> tuple[str, ...]:
        """Endings of the names that the result may get."""
        return ("", REJECTED) if rejects else ("",)

    @property
    def files(self) -> dict[str, Path]:
        """What a GGUF file may come to be called, by the ending of its folder's name; empty for a folder."""
        if self.file is None:
            return {}
        return {"": self.file, REJECTED: self.file.with_name(f"{self.file.stem}{REJECTED}{_SUFFIX}")}

    def workspace(
        self, job: Mapping[str, Any], inputs: Sequence[str | PathLike[str]], *, force: bool, rejects: bool
    ) -> Workspace:
        """Where the result is made."""
        suffixes = self.suffixes(rejects=rejects)
        places = {suffix: file for suffix, file in self.files.items() if suffix in suffixes}
        apart = Apart(MODEL_FILE, places) if places else None
        return Workspace(self.folder, job, force=force, inputs=inputs, suffixes=suffixes[1:], apart=apart)

    def complete(self, work: Workspace, *, rejected: bool) -> Path:
        """Give the result its final name.

        Raises:
            ShapeMoeError: see :meth:`shape_moe.workspace.Workspace.complete`.
        """
        suffix = REJECTED if rejected else ""
        path = work.complete(suffix)
        return self.files.get(suffix, path)


def place_of(model: str | PathLike[str], out: str | PathLike[str]) -> PrunedPlace:
    """The place of a pruned model, by what the original is.

    Raises:
        UsageError: when a GGUF model is to become a folder, or a folder a GGUF file.
    """
    path, named = Path(out).absolute(), Path(out).suffix == _SUFFIX
    if named:
        path = real_place(path)
    check_named(model)
    if is_gguf(Path(model)):
        if not named:
            raise UsageError(f"A GGUF file is pruned into a GGUF file: name one, as --output {path.name}{_SUFFIX}.")
        return PrunedPlace(beside(path), path)
    if named:
        raise UsageError(
            f"{model} is not a GGUF file, so it is pruned into a folder: name one, prune with --target stock, and "
            "convert the result with llama.cpp's convert_hf_to_gguf.py."
        )
    return PrunedPlace(path)


def file_beside(folder: Path) -> Path | None:
    """The pruned GGUF file that a folder lies beside, None where there is none."""
    file = folder.with_name(folder.name.removesuffix(_BESIDE) + _SUFFIX)
    return file if folder.name.endswith(_BESIDE) and is_gguf(file) else None


def made_by(file: Path) -> Path | None:
    """The folder of what a pruned GGUF file was made by, beside the file or what a link to it points to; else None.

    A folder of a run that was killed before file and folder both had their names is passed over: it belongs to a file
    that is yet to come.
    """
    folders = (beside(file), beside(file.resolve()))
    return next((folder for folder in folders if folder.is_dir() and not is_left_to_finish(folder)), None)


def beside(file: Path) -> Path:
    """What the folder beside a pruned GGUF file is called."""
    return file.with_name(file.stem + _BESIDE)


@dataclass(frozen=True)
class SeriesPlace:
    """The place of several pruned models that are made together: one folder, which gets its name when all are there.

    Attributes:
        folder: of the series.
        keeps: the keep rates, largest first.
        gguf: whether each is a GGUF file with a folder beside it.
    """

    folder: Path
    keeps: tuple[float, ...]
    gguf: bool

    def check(self, inputs: Sequence[str | PathLike[str]], *, force: bool) -> None:
        """Refuse a place where something lies already, or that touches an input.

        Raises:
            UsageError: see :func:`shape_moe.workspace.check_output`.
        """
        try:
            check_output(self.folder, force=force or is_left_to_finish(self.folder), inputs=inputs)
        except UsageError:
            drop_left_lock(lock_of(self.folder))
            raise

    def name(self, keep: float, *, rejected: bool = False) -> str:
        """What the model of a keep rate is called."""
        return f"{self._stem(keep, rejected)}{_SUFFIX if self.gguf else ''}"

    def file(self, keep: float) -> Path | None:
        """The GGUF file of a keep rate, None where it is a folder."""
        return self.folder / self.name(keep) if self.gguf else None

    def inside(self, keep: float, work: Path) -> Path:
        """The folder that the model of a keep rate is written into, within the work."""
        return work / f"{self._stem(keep)}{_BESIDE if self.gguf else ''}"

    def take_back(self, keep: float, work: Path) -> None:
        """Put what an interrupted run had given its name back to where it is written."""
        folder = self.inside(keep, work)
        for rejected in (False, True):
            file, done = work / self.name(keep, rejected=rejected), work / self._beside(keep, rejected)
            if done != folder and done.is_dir():
                done.rename(folder)
            if self.gguf and file.is_file():
                file.replace(folder / MODEL_FILE)

    def rename(self, keep: float, work: Path, *, rejected: bool) -> None:
        """Give a finished model its name within the work."""
        folder = self.inside(keep, work)
        if self.gguf:
            (folder / MODEL_FILE).replace(work / self.name(keep, rejected=rejected))
        if rejected:
            folder.rename(work / self._beside(keep, rejected))

    def _beside(self, keep: float, rejected: bool) -> str:
        return f"{self._stem(keep, rejected)}{_BESIDE if self.gguf else ''}"

    def _stem(self, keep: float, rejected: bool = False) -> str:
        return f"{self.folder.name}-{keep!r}{REJECTED if rejected else ''}"


def series_place(model: str | PathLike[str], out: str | PathLike[str], keeps: Sequence[float]) -> SeriesPlace:
    """The place of a series: a folder; a name that ends in ``.gguf`` stands for the one without."""
    check_named(model)
    path = Path(out).absolute()
    folder = path.with_name(path.name.removesuffix(_SUFFIX)) if path.name != _SUFFIX else path
    return SeriesPlace(folder, tuple(sorted(keeps, reverse=True)), is_gguf(Path(model)))
