"""The HTML report: find what there is about a model, check that it belongs together, and write one file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from os import PathLike
from pathlib import Path

from shape_moe.architectures.fingerprint import check_fingerprint
from shape_moe.architectures.gguf_file import is_gguf
from shape_moe.architectures.moe_config import find_family
from shape_moe.architectures.sizes import measure
from shape_moe.architectures.snapshot import Snapshot, open_headers, open_snapshot
from shape_moe.architectures.tensor_names import tensor_role
from shape_moe.errors import DataError, ShapeMoeError, UsageError
from shape_moe.evaluation.evaluated import read_evaluation
from shape_moe.evaluation.forgotten import Forgotten
from shape_moe.evaluation.result_file import read_result
from shape_moe.evaluation.swept import read_sweep
from shape_moe.evaluation.verdict import Verdict
from shape_moe.jobs.pruned_place import made_by
from shape_moe.jobs.report_sources import Found, Place, find_all, find_source, members
from shape_moe.json_file import read_json
from shape_moe.output_file import OutputFile
from shape_moe.progress import SILENT, Progress
from shape_moe.reporting.demo_rows import whole_demo
from shape_moe.reporting.experiment_tables import whole_experiment
from shape_moe.reporting.html import render_report
from shape_moe.reporting.material import Material, Sizes
from shape_moe.scoring.registry import scorers
from shape_moe.scoring.scores import Scores, read_scores, score_trace
from shape_moe.selection.agreement import scoring_of
from shape_moe.selection.layer_curves import load_curves
from shape_moe.selection.selection import Selection, check_against_model, load_selection
from shape_moe.tracing.trace import Trace, load_trace
from shape_moe.workspace import write_text


@dataclass(frozen=True)
class ReportResult:
    """A written report.

    Attributes:
        path: the file.
        sections: names of its sections.
        size: its bytes.
    """

    path: Path
    sections: tuple[str, ...]
    size: int


def report(
    source: Place | Sequence[Place],
    out: Place = "report.html",
    *,
    selection: Place | Selection | None = None,
    sweep: Place | None = None,
    evaluation: Place | None = None,
    model: Place | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> ReportResult:
    """Write an HTML report: one file that is looked at in a browser, without a network.

    Args:
        source: anything that a verb wrote: a pruned checkpoint's folder, a trace, a selection, a table of values
            (``.csv``), the folder or file of a series, a sweep, an evaluation, an experiment or a demonstration; or
            several of these. What is of one model is shown together, as far as there is one of each kind.
        out: the file.
        selection: a selection to show, where the source does not hold one.
        sweep: a sweep's folder or its ``sweep.json``.
        evaluation: an evaluation's folder or its ``evaluation.json``.
        model: the original (a folder or hub id), for the sizes before and after.
        force: replace an existing file; accept artifacts of unknown origin.
        progress: where to show progress.

    Raises:
        UsageError: when the output exists, the source is nothing that can be shown, or inputs contradict each other.
        ShapeMoeError: when an input is damaged, or was made from another model.
    """
    file = Path(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    asked = [source] if isinstance(source, str | PathLike) else list(source)
    if not asked:
        raise UsageError("Give at least one source to report on.")
    sources = [member for place in asked for member in members(place)]
    read = (*sources, selection, sweep, evaluation) if file.suffix.lower() not in (".html", ".htm") else ()
    with OutputFile(file, force=force, inputs=[place for place in read if isinstance(place, str | PathLike)]):
        with progress.phase("Reading and scoring", len(sources), "source") as advance:
            if len(sources) == 1:
                found = find_source(Path(sources[0]), selection, sweep)
                if found.evaluation is not None and evaluation is not None:
                    raise UsageError(f"{sources[0]} is an evaluation already: leave --evaluation out.")
                materials = [_gather(found, selection, evaluation or found.evaluation, model, force=force)]
            else:
                if isinstance(selection, Selection):
                    raise UsageError("Beside several sources, give the selection as a file.")
                more = [place for place in (selection, sweep, evaluation) if place is not None]
                together = find_all([*sources, *more])
                materials = [_gather(found, None, found.evaluation, model, force=force) for found in together]
            advance(len(sources))
        with progress.phase("Writing the report", 1, "page") as advance:
            page, names = render_report(materials)
            write_text(file, page)
            advance(1)
        return ReportResult(file, tuple(names), file.stat().st_size)


def _beside(checkpoint: Path | None, name: str) -> Path | None:
    """A file of the job that wrote a checkpoint; None where it is not there."""
    folder = made_by(checkpoint) if checkpoint is not None and is_gguf(checkpoint) else checkpoint
    file = folder / "shape" / name if folder is not None else None
    return file if file is not None and file.is_file() else None


def _judgement(checkpoint: Path | None) -> tuple[Verdict | None, Forgotten | None]:
    """What the job that wrote a checkpoint says of it."""
    file = _beside(checkpoint, "judgement.json")
    if file is None:
        return None, None
    try:
        document = read_json(file)
        forgotten = document.get("forgotten")
        return Verdict.from_document(document), Forgotten.from_document(forgotten) if forgotten else None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, UsageError) as error:
        raise DataError(f"{file} is damaged; delete it to get a report without its verdict.") from error


def _gather(
    found: Found,
    selection: Place | Selection | None,
    evaluation: Place | None,
    model: Place | None,
    *,
    force: bool,
) -> Material:
    given = selection if selection is not None else found.selection
    chosen = given if isinstance(given, Selection) or given is None else load_selection(given)
    trace = load_trace(found.trace) if found.trace is not None else None
    verdict, forgotten = _judgement(found.checkpoint)
    experiment, demo = found.experiment, found.demo
    curves = _beside(found.checkpoint, "curves.json")
    material = Material(
        source=found.source,
        selection=chosen,
        trace=trace,
        sweep=read_sweep(found.sweep) if found.sweep is not None else None,
        evaluation=read_evaluation(Path(evaluation)) if evaluation is not None else None,
        given_model=str(model) if model is not None else None,
        checkpoint=found.checkpoint is not None,
        verdict=verdict,
        forgotten=forgotten,
        experiment=read_result(experiment, experiment.name, "experiment", whole_experiment) if experiment else None,
        demo=read_result(demo, demo.name, "demo", whole_demo) if demo else None,
        curves=load_curves(curves) if curves is not None else None,
    )
    _check_origin(material, force=force)
    rivals = _rivals(trace, chosen) if trace is not None else ()
    scores, remarks = _values(found, trace, chosen, rivals)
    if chosen is not None and scores is not None:
        _check_shape(chosen, scores, found.source)
    sizes = _sizes(found.checkpoint, chosen, model) or _swept_sizes(material)
    return replace(material, scores=scores, rivals=rivals, sizes=sizes, remarks=tuple(remarks))


def _check_origin(material: Material, *, force: bool) -> None:
    """Check by fingerprints that all that have one are of one model; tables of values have none."""
    prints = {
        "The selection": material.selection.fingerprint if material.selection else None,
        "The trace": material.trace.info.fingerprint if material.trace else None,
        "The sweep": material.sweep.fingerprint if material.sweep else None,
        "The evaluation": material.evaluation.fingerprint if material.evaluation else None,
    }
    known = [(what, text) for what, text in prints.items() if text is not None]
    for (_, first), (what, text) in pairwise(known):
        if text != first:
            check_fingerprint(text, first, what, force=force)


def _values(
    found: Found, trace: Trace | None, selection: Selection | None, rivals: tuple[Scores, ...]
) -> tuple[Scores | None, list[str]]:
    """The values to show, and what to say where they are not those that the selection was made with.

    Raises:
        ShapeMoeError: when the scorer cannot value this trace; the message says why.
    """
    if found.table is not None:
        return read_scores(found.table), []
    if trace is None:
        return None, []
    known_sets = scorers()["shape"].can_value(trace.info.top_k) and "coalitions" not in trace.info.left_out
    usual = "shape" if known_sets else "frequency"
    wanted, remarks = selection.scorer if selection is not None else usual, []
    if wanted not in scorers(converted=True):
        remarks.append(
            f"The selection was made by {wanted!r}, which is not a scorer of this installation: the values shown are "
            f"those of the scorer {usual}."
        )
        wanted = usual
    known = next((entry for entry in rivals if entry.scorer == wanted), None)
    return known or score_trace(trace, wanted, scoring_of(selection)), remarks


def _check_shape(selection: Selection, scores: Scores, source: str) -> None:
    if selection.num_experts != scores.num_experts or tuple(selection.layers) != scores.layers:
        raise UsageError(
            f"The selection is for {len(selection.layers)} layers of {selection.num_experts} experts, but {source} "
            f"describes {len(scores.layers)} layers of {scores.num_experts}: they are of different models."
        )


def _rivals(trace: Trace, selection: Selection | None) -> tuple[Scores, ...]:
    """Values by every scorer that can value this trace."""
    options = scoring_of(selection)
    found = []
    for name in scorers(converted=True):
        try:
            found.append(score_trace(trace, name, options))
        except ShapeMoeError:  # needs what this trace does not hold, or cannot value top-1 routing
            continue
    return tuple(found)


def _sizes(checkpoint: Path | None, selection: Selection | None, model: Place | None) -> Sizes | None:
    if selection is None:
        return None
    pruned = open_snapshot(checkpoint) if checkpoint is not None else None
    if model is not None:
        snapshot = open_headers(model)
        check_against_model(selection, snapshot.moe, snapshot.moe_layers, selection.routing)
        size = measure(snapshot)
        after = pruned.total_bytes if pruned is not None else size.at_keep(selection.kept)
        return Sizes(size.total, after, "measured" if pruned is not None else "from the tensors' sizes")
    if pruned is not None:
        return Sizes(original_bytes(pruned, selection), pruned.total_bytes, "counted back from this checkpoint")
    return None


def _swept_sizes(material: Material) -> Sizes | None:
    """The sizes of the selection as a sweep gives them, None where it does not."""
    sweep = material.sweep
    point = sweep.point_of(material.selection) if sweep is not None else None
    if sweep is None or point is None or point.size is None or sweep.dense_size is None:
        return None
    return Sizes(sweep.dense_size, point.size, "as the sweep says")


def original_bytes(checkpoint: Snapshot, selection: Selection) -> int:
    """Bytes of the model that a checkpoint was pruned from.

    A layer's experts are of one size, so that the removed ones can be counted back; what no pruned checkpoint keeps
    (layers of multi-token prediction) cannot.
    """
    family = find_family(checkpoint.config)
    total, experts = 0, Counter[int]()
    for name, slot in checkpoint.tensors.items():
        role = tensor_role(family, name)
        if role.layer in selection.layers and role.role in ("expert", "packed"):
            experts[role.layer] += slot.size
        elif role.layer in selection.layers and role.role == "router":
            total += slot.size * selection.num_experts // slot.shape[0]
        else:
            total += slot.size
    kept = {layer: len(ids) for layer, ids in selection.layers.items()}
    return total + sum(size * selection.num_experts // kept[layer] for layer, size in experts.items())
