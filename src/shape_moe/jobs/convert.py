"""Files of other tools to traces and selections, and back."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Literal

from shape_moe.architectures.fingerprint import fingerprint
from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.errors import UsageError
from shape_moe.interop.coalition_counts import coalitions_text
from shape_moe.interop.fillers import FILLERS
from shape_moe.interop.kinds import KINDS, Kind, kind_of
from shape_moe.interop.selected_experts import read_selected, selected_text
from shape_moe.output_file import OutputFile
from shape_moe.progress import SILENT, Progress
from shape_moe.selection.selection import Selection, load_selection
from shape_moe.source_files import WatchedFiles
from shape_moe.tracing.trace import Trace, load_trace
from shape_moe.workspace import Workspace, check_output, write_text

Target = Literal["shape-moe", "reference"]
_OURS: tuple[Kind, ...] = ("selection", "trace")


def convert(
    source: str | PathLike[str],
    out: str | PathLike[str],
    *,
    model: str | PathLike[str] | None = None,
    revision: str | None = None,
    kind: str | None = None,
    to: str | None = None,
    skip_bad: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> Trace | Selection:
    """Convert a file of another tool, or a trace or selection for another tool.

    Args:
        source: server responses, coalition counts, selected experts or an imatrix; or a trace or selection of ours.
        out: a folder where a trace is made, a file otherwise.
        model: the model that the source is about; responses, coalition counts and an imatrix need it.
        revision: branch, tag or commit of that model, where it is on the hub.
        kind: what the source is, one of :data:`shape_moe.interop.kinds.KINDS`; by default its content tells.
        to: ``shape-moe`` or ``reference``; by default the other one of what the source is.
        skip_bad: leave responses that cannot be used out, and count them.
        force: replace an existing result.
        progress: where to show progress.

    Returns:
        The trace or selection that was written or, on the way out, read.

    Raises:
        DataError: when the source is malformed or not this model's.
        UsageError: when the request contradicts itself, or the output exists.
    """
    path, target = Path(source), Path(out)
    found = _kind(path, kind)
    _check_request(path, found, model, revision, to, skip_bad=skip_bad)
    inputs = [path, *([model] if model else [])]
    if found in FILLERS:
        check_output(target, force=force, inputs=inputs)
        snapshot = open_snapshot(model, revision) if model else None
        assert snapshot is not None
        watched = WatchedFiles([path, snapshot.path])
        trace = FILLERS[found](path, snapshot, skip_bad, progress).fill(None)
        watched.check()
        return _save(trace, target, path, snapshot, force=force)
    with OutputFile(target, force=force, inputs=inputs):
        if found == "trace":
            trace = load_trace(path)
            write_text(target, coalitions_text(trace))
            return trace
        return _convert_selection(found, path, target, open_snapshot(model, revision) if model else None)


def _kind(source: Path, kind: str | None) -> Kind:
    if kind is None:
        return kind_of(source)
    for known in KINDS:
        if kind == known:
            if not source.exists():
                raise UsageError(f"There is no file {source}.")
            return known
    raise UsageError(f"--from must be one of {', '.join(KINDS)}, not {kind!r}.")


def _check_request(
    source: Path,
    kind: Kind,
    model: str | PathLike[str] | None,
    revision: str | None,
    to: str | None,
    *,
    skip_bad: bool,
) -> None:
    wanted: Target = "reference" if kind in _OURS else "shape-moe"
    if to not in (None, "shape-moe", "reference"):
        raise UsageError(f"--to must be shape-moe or reference, not {to!r}.")
    if revision is not None and model is None:
        raise UsageError("--revision says which version of --model is meant: name the model, or leave it out.")
    if to not in (None, wanted):
        raise UsageError(f"{source} ({kind}) is in that format already; it converts with --to {wanted}.")
    if kind in FILLERS and model is None:
        raise UsageError(f"{source} ({kind}) does not say which model it is about: name it with --model.")
    if kind in _OURS and model is not None:
        raise UsageError(f"{source} ({kind}) says which model it is about: leave --model out.")
    if skip_bad and kind != "responses":
        raise UsageError(f"--skip-bad is for server responses, not for {kind}.")


def _convert_selection(kind: Kind, source: Path, out: Path, snapshot: Snapshot | None) -> Selection:
    if kind == "selection":
        selection = load_selection(source)
        write_text(out, selected_text(selection))
        return selection
    selection = read_selected(source, snapshot)
    selection.save(out)
    return selection


def _save(trace: Trace, out: Path, source: Path, snapshot: Snapshot, *, force: bool) -> Trace:
    job = {"verb": "convert", "source": trace.info.source, "model": fingerprint(snapshot)}
    with Workspace(out, job, force=force, inputs=[source, snapshot.path]) as work:
        trace.save(work.path)
        return load_trace(work.complete())
