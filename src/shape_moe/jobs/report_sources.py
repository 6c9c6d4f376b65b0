"""What the sources of a report are, and which of them belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path

from shape_moe.architectures.gguf_file import is_gguf
from shape_moe.errors import UsageError
from shape_moe.evaluation.evaluated import EVALUATION_FILE
from shape_moe.evaluation.swept import SWEEP_FILE
from shape_moe.jobs.pruned_place import beside, file_beside, made_by
from shape_moe.jobs.select import is_table
from shape_moe.json_file import read_json
from shape_moe.reporting.series import SERIES_FILE
from shape_moe.selection.selection import Selection

Place = str | PathLike[str]
_RESULTS = {
    SWEEP_FILE: "sweep",
    "demo.json": "demo",
    "experiment.json": "experiment",
    EVALUATION_FILE: "evaluate",
}
"""Files of results by the verb that writes them; a folder is what the first of them says."""
_SHOWN = (
    "Give a pruned checkpoint's folder or GGUF file, a trace's folder, a selection (.json), a table of values (.csv), "
    "or the folder or file of a series, a sweep, an evaluation, an experiment or a demo."
)


_BESIDE = frozenset({"trace", "selection"})


@dataclass(frozen=True)
class Found:
    """What one source, or several that belong together, bring.

    Attributes:
        source: the source's path, of several the first one's.
        trace: a trace.
        table: a table of values.
        selection: a selection.
        sweep: a sweep.
        checkpoint: a pruned checkpoint.
        evaluation: an evaluation.
        experiment: an experiment.
        demo: a demonstration.
        beside: names of those that were not asked for, but lie beside what was.
    """

    source: str
    trace: Path | None = None
    table: Path | None = None
    selection: Path | None = None
    sweep: Path | None = None
    checkpoint: Path | None = None
    evaluation: Path | None = None
    experiment: Path | None = None
    demo: Path | None = None
    beside: frozenset[str] = frozenset()

    @property
    def parts(self) -> dict[str, Path]:
        """What is there, by its kind."""
        names = [field.name for field in fields(self) if field.name not in ("source", "beside")]
        return {name: path for name in names if (path := getattr(self, name)) is not None}

    @property
    def asked(self) -> set[str]:
        """Kinds that were asked for."""
        return set(self.parts) - self.beside

    def fingerprint(self) -> str | None:
        """Identifies the model, None where nothing says which one it is."""
        files = {"selection": "", "trace": "trace.json", "sweep": SWEEP_FILE, "evaluation": EVALUATION_FILE}
        for kind, name in files.items():
            if (path := self.parts.get(kind)) is not None:
                file = path / name if path.is_dir() else path
                if file.is_file() and (text := read_json(file).get("fingerprint")):
                    return str(text)
        return None

    def goes_with(self, other: Found) -> bool:
        """Whether both can be shown as one: of one model, and nothing asked for twice."""
        alone = {"experiment", "demo"}
        if self.asked & other.asked or (self.asked | other.asked) & alone:
            return False
        if {"trace", "table"} <= self.asked | other.asked:
            return False
        ours, theirs = self.fingerprint(), other.fingerprint()
        return ours is None or theirs is None or ours == theirs

    def joined(self, other: Found) -> Found:
        """Both as one: what was asked for goes before what lies beside something."""
        parts = {**other.parts, **self.parts}
        parts |= {name: other.parts[name] for name in other.asked}
        return Found(self.source, **parts, beside=frozenset(set(parts) - self.asked - other.asked))


_ORDER = ("checkpoint", "selection", "trace", "table", "sweep", "evaluation", "experiment", "demo")


def members(source: Place) -> list[Place]:
    """The models of a series that was pruned together, from its folder or its file; any other source by itself.

    Raises:
        UsageError: when none of the series' models is there.
    """
    given = Path(source)
    file = given if given.name == SERIES_FILE else given / SERIES_FILE
    if not file.is_file():
        return [source]
    entries = read_json(file).get("models")
    names = [entry.get("name") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    models: list[Place] = [file.parent / Path(name).name for name in names if isinstance(name, str)]
    found = [model for model in models if Path(model).exists()]
    if not found:
        raise UsageError(f"{given} is a series of which no model is left: give the models' own folders.")
    return found


def find_all(sources: Sequence[Place]) -> list[Found]:
    """Everything that several sources bring; those that belong together are one.

    Args:
        sources: what the report is to show.

    Raises:
        UsageError: when a source is nothing that can be shown.
    """
    every = {_identity(found): found for found in (find_source(Path(source)) for source in sources)}
    together: list[Found] = []
    for found in sorted(every.values(), key=lambda found: min(_ORDER.index(name) for name in found.asked)):
        place = next((i for i, known in enumerate(together) if known.goes_with(found)), None)
        if place is None:
            together.append(found)
        else:
            together[place] = together[place].joined(found)
    return together


def _identity(found: Found) -> tuple[tuple[str, Path], ...]:
    """Two ways to name one source are one."""
    return tuple(sorted((name, found.parts[name].resolve()) for name in found.asked))


def find_source(source: Path, selection: Place | Selection | None = None, sweep: Place | None = None) -> Found:
    """What one source is, and what lies beside it.

    Args:
        source: a file or folder.
        selection: a selection, where the source does not hold one.
        sweep: a sweep that belongs to it.

    Raises:
        UsageError: when it is nothing that can be shown, or brings what is given besides.
    """
    given = Path(sweep) if sweep is not None else None
    if is_table(source):
        if not source.is_file():
            raise UsageError(f"There is no file {source}.")
        return Found(str(source), table=source, sweep=given)
    if source.is_file():
        return _of_file(source, selection, given)
    for name, kind in _RESULTS.items():
        if (source / name).is_file():
            return _of_result(source / name, kind, selection, given)
    if (source / "trace.json").is_file():
        return Found(str(source), trace=source, sweep=given)
    chosen = source / "shape" / "selection.json"
    if chosen.is_file():
        if selection is not None:
            raise UsageError(f"{source} is a pruned checkpoint and holds its selection: leave --selection out.")
        trace = source / "shape" / "trace"
        lies = trace if trace.is_dir() else None
        weights: Path | None = source if (source / "config.json").is_file() else file_beside(source)
        return Found(str(source), lies, selection=chosen, sweep=given, checkpoint=weights, beside=_BESIDE)
    if not source.exists():
        raise UsageError(f"There is no folder or file {source}.")
    raise UsageError(f"{source} is not something that shape-moe wrote and a report can show. {_SHOWN}")


def _of_gguf(file: Path, selection: Place | Selection | None, sweep: Path | None) -> Found:
    """What lies beside a pruned GGUF file.

    Raises:
        UsageError: when that is not there.
    """
    folder = made_by(file) or beside(file)
    if not (folder / "shape" / "selection.json").is_file():
        raise UsageError(f"A report on {file} is made from the folder {folder}, which pruning left beside it.")
    return replace(find_source(folder, selection, sweep), source=str(file), checkpoint=file)


def _of_file(file: Path, selection: Place | Selection | None, sweep: Path | None) -> Found:
    """What a file of JSON is, by its content, or what lies beside a GGUF file."""
    if is_gguf(file):
        return _of_gguf(file, selection, sweep)
    if file.suffix.lower() != ".json":
        raise UsageError(f"{file} is not something that shape-moe wrote and a report can show. {_SHOWN}")
    document = read_json(file)
    verb = document.get("verb")
    if verb in _RESULTS.values():
        return _of_result(file, str(verb), selection, sweep)
    if "layers" in document and "keep_asked" in document:
        if selection is not None:
            raise UsageError(f"{file} is a selection already: leave --selection out.")
        if (found := _belongs_to_checkpoint(file)) is not None:
            return find_source(found, None, sweep)
        return Found(str(file), selection=file, sweep=sweep)
    if file.name in {"judgement.json", "manifest.json"} and (found := _belongs_to_checkpoint(file)) is not None:
        return find_source(found, selection, sweep)
    if file.name == "trace.json":
        return find_source(file.parent, selection, sweep)
    raise UsageError(f"{file} is not something that shape-moe wrote and a report can show. {_SHOWN}")


def _belongs_to_checkpoint(file: Path) -> Path | None:
    """The checkpoint that a file of its ``shape`` folder describes."""
    folder = file.absolute().parent
    whole = (
        folder.name == "shape" and (folder / "selection.json").is_file() and (folder.parent / "config.json").is_file()
    )
    return folder.parent if whole else None


def _of_result(file: Path, verb: str, selection: Place | Selection | None, sweep: Path | None) -> Found:
    """What the result of a verb brings, with what lies beside it."""
    beside = file.parent
    if verb == "sweep":
        if sweep is not None:
            raise UsageError(f"{beside} is a sweep already: leave --sweep out.")
        trace, recommended = beside / "trace", beside / "recommended.json"
        usual = file.name == SWEEP_FILE
        return Found(
            str(beside) if usual else str(file),
            trace=trace if usual and (trace / "trace.json").is_file() else None,
            selection=recommended if usual and selection is None and recommended.is_file() else None,
            sweep=file,
            beside=_BESIDE,
        )
    if verb == "demo":
        trace = beside / f"{read_json(file).get('task')}-trace"
        there = trace if (trace / "trace.json").is_file() else None
        return Found(str(beside), there, sweep=sweep, demo=file, beside=_BESIDE)
    if verb == "experiment":
        return Found(str(file), experiment=file, sweep=sweep)
    return Found(str(file), evaluation=file, sweep=sweep)
