"""Measure what each layer's cut costs: from a trace and its examples to layer curves."""

from __future__ import annotations

from os import PathLike

from shape_moe.architectures.same_routers import check_same_model
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.records import DataOptions
from shape_moe.calibration.sources import Data
from shape_moe.errors import ShapeMoeError
from shape_moe.jobs.curves import CurveMaker
from shape_moe.jobs.session import DEFAULT_SAMPLES, ExampleOptions, ModelSession, as_example_options
from shape_moe.jobs.trace import open_trace
from shape_moe.jobs.way import check_measurable
from shape_moe.output_file import OutputFile
from shape_moe.progress import SILENT, Progress
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.selection.layer_curves import LayerCurves
from shape_moe.selection.method import Method
from shape_moe.source_files import WatchedFiles
from shape_moe.tracing.trace import Trace

MEASURED = Method("replacement", "measured")
"""What layers are ranked by when nothing else is said."""


def measure(
    model: str | PathLike[str],
    trace: str | PathLike[str] | Trace,
    data: ExampleOptions | DataOptions | Data,
    out: str | PathLike[str] | None = None,
    *,
    method: Method = MEASURED,
    scoring: ScoreOptions | None = None,
    passes: float | None = None,
    revision: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> LayerCurves:
    """Measure what each layer loses when it alone is cut to its best experts.

    Args:
        model: a folder or a hub id.
        trace: its trace, by which experts are ranked.
        data: examples, as a rule those that were traced; at most :data:`shape_moe.jobs.curves.MOST_TOKENS` tokens of
            them are run.
        out: file for the curves; None keeps them in memory. What an interrupted run has measured is kept beside it, in
            ``OUT.passes``, and goes when the curves are complete.
        method: the scorer that ranks experts, and the routing in which layers are cut.
        scoring: weights and seed.
        passes: what they may cost, in forward passes of all examples: the grid shrinks to fit; None for all of it.
        revision: of a hub model.
        force: replace an existing file, accept a trace of unknown origin.
        progress: where to show progress.

    Raises:
        ShapeMoeError: when something is wrong with the model, the trace or the data; the message says what to do.
    """
    options = as_example_options(data, DEFAULT_SAMPLES)
    named = [given for given in (model, trace) if isinstance(given, str | PathLike)]
    with OutputFile(out, force=force, inputs=[*named, *options.data.files], journal=".passes") as output:
        snapshot = open_snapshot(model, revision, trust_remote_code=options.trust_remote_code)
        watched = WatchedFiles([snapshot.path, *named, *options.data.files])
        if isinstance(trace, Trace):
            check_same_model(trace.info, snapshot, "The trace", force=force)
            found = trace
        else:
            found = open_trace(trace, snapshot, progress, force=force)
        check_measurable(snapshot, options)
        session = ModelSession.open(snapshot, options, None, progress)
        maker = CurveMaker(session, session.calibrator, found, scoring or ScoreOptions(), progress, passes=passes)
        maker.journal = output.journal
        curves = maker.measured(method)
        try:
            watched.check()
        except ShapeMoeError:
            if output.journal is not None:  # nothing of it is worth going on from
                output.journal.unlink(missing_ok=True)
            raise
        if out is not None:
            curves.save(out)
        return curves
