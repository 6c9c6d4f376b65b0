"""Measure what each layer's cut costs: from a trace and its examples to layer curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING

from shape_moe.architectures.families import FAMILIES
from shape_moe.architectures.moe_config import RouterFacts, check_gate_scale
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.batches import batches
from shape_moe.calibration.records import DataOptions
from shape_moe.calibration.responses import pad_token_id
from shape_moe.calibration.sources import Data
from shape_moe.errors import DataError, UsageError
from shape_moe.jobs.session import DEFAULT_SAMPLES, ExampleOptions, ModelSession, as_example_options
from shape_moe.jobs.trace import open_trace
from shape_moe.jobs.way import check_measurable
from shape_moe.output_file import OutputFile
from shape_moe.progress import SILENT, Progress
from shape_moe.scoring.registry import ScoreOptions, get_scorer
from shape_moe.scoring.scores import Scores, score_trace
from shape_moe.selection.budget import Constraints, Room
from shape_moe.selection.layer_curves import LayerCurves, counts_to_measure
from shape_moe.selection.method import Method
from shape_moe.selection.rules import layer_ranks
from shape_moe.selection.selection import Selection, whole_selection
from shape_moe.source_files import WatchedFiles
from shape_moe.tracing.classes import NO_CLASS
from shape_moe.tracing.trace import Trace
from shape_moe.units import counted

if TYPE_CHECKING:
    from shape_moe.calibration.examples import Example

MOST_TOKENS = 8192
"""Layers are measured over at most so many tokens of the calibration examples."""
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
    revision: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> LayerCurves:
    """Measure what each layer loses when it alone is cut to its best experts.

    Args:
        model: a folder or a hub id.
        trace: its trace, by which experts are ranked.
        data: examples, as a rule those that were traced; at most :data:`MOST_TOKENS` tokens of them are run.
        out: file for the curves; None keeps them in memory.
        method: the scorer that ranks experts, and the routing in which layers are cut.
        scoring: weights and seed.
        revision: of a hub model.
        force: replace an existing file, accept a trace of unknown origin.
        progress: where to show progress.

    Raises:
        ShapeMoeError: when something is wrong with the model, the trace or the data; the message says what to do.
    """
    options = as_example_options(data, DEFAULT_SAMPLES)
    named = [given for given in (model, trace) if isinstance(given, str | PathLike)]
    with OutputFile(out, force=force, inputs=[*named, *options.data.files]):
        snapshot = open_snapshot(model, revision, trust_remote_code=options.trust_remote_code)
        watched = WatchedFiles([snapshot.path, *named, *options.data.files])
        found = trace if isinstance(trace, Trace) else open_trace(trace, snapshot, progress, force=force)
        check_measurable(snapshot, options)
        session = ModelSession.open(snapshot, options, None, progress)
        curves = measured_curves(session, found, method, scoring or ScoreOptions(), progress)
        watched.check()
        if out is not None:
            curves.save(out)
        return curves


def measured_curves(
    session: ModelSession, trace: Trace, method: Method, scoring: ScoreOptions, progress: Progress
) -> LayerCurves:
    """The layer curves of a model that a session loads, over the session's examples.

    Raises:
        UsageError: when the scorer does not fit the trace.
        DataError: when no example holds a response.
    """
    from shape_moe.evaluation.layer_costs import layer_costs

    info = trace.info
    check_gate_scale(method.gate_scale, FAMILIES.get(info.family or ""), info.routing.renormalises)
    weights = get_scorer(method.scorer).weights_for(trace, scoring.weights)
    scores = score_trace(trace, method.scorer, replace(scoring, weights=weights))
    maker = session.calibrator
    examples = _within_reach(maker.examples or maker.run(session.answerer, None))
    if not any(example.spans for example in examples):
        raise DataError(f"No example of {maker.data.name} holds a response, so no token predicts one.")
    counts, cuts = cuts_of(scores, info.routing, method)
    model = session.model
    todo = list(batches(examples, maker.options.batch_size, pad_token_id(model, maker.tokeniser)))
    passes = len(todo) * len(cuts) * len(counts)
    classes = info.classes if len(info.classes) > 1 else (NO_CLASS,)

    def class_of(group: str | None) -> int:
        name = group or NO_CLASS
        return classes.index(name) if len(classes) > 1 and name in classes else 0

    tokens = sum(len(example.tokens) for example in examples)
    progress.note(
        f"Measuring {counted(len(cuts), 'layer')} at {counted(len(counts), 'count')} each over {tokens:,} tokens "
        f"of {counted(len(examples), 'example')}."
    )
    with progress.phase("Measuring layers", passes, "pass") as advance:
        sums, predicting = layer_costs(model, todo, cuts, class_of, len(classes), advance)
    return LayerCurves(
        fingerprint=info.fingerprint,
        model=info.model,
        scorer=method.scorer,
        options={**weights.flags, "seed": scoring.seed},
        routing=method.routing,
        gate_scale=method.gate_scale,
        num_experts=info.num_experts,
        layers=info.layers,
        counts=counts,
        classes=classes,
        tokens=predicting.tolist(),
        sums=sums.tolist(),
    )


def cuts_of(scores: Scores, facts: RouterFacts, method: Method) -> tuple[tuple[int, ...], dict[int, list[Selection]]]:
    """Counts at which layers are measured, and for each layer the selections that cut it alone to so many experts."""
    groups, floor = (facts.groups, facts.floor) if method.routing == "reroute" else (1, 1)
    experts, ranks = scores.num_experts, layer_ranks(scores.values, scores.tiebreak)
    counts = counts_to_measure(experts, floor, groups)
    if not counts:
        raise UsageError(f"Every layer must keep all of its {experts} experts: there is nothing to measure.")
    room = Room(len(scores.layers), experts, Constraints(floor=floor, groups=groups))
    order = room.order(ranks.astype(float), ranks)
    whole = replace(whole_selection(scores.layers, experts), routing=method.routing, gate_scale=method.gate_scale)
    cuts = {}
    for row, layer in enumerate(scores.layers):
        kept = [sorted(int(i) for i in order[row][:, : count // groups].ravel()) for count in counts]
        cuts[layer] = [replace(whole, layers={layer: ids}) for ids in kept]
    return counts, cuts


def _within_reach(examples: Sequence[Example]) -> list[Example]:
    """The first examples of every class in turn, up to :data:`MOST_TOKENS` tokens; one at least."""
    turns: dict[str | None, int] = {}
    order = []
    for number, example in enumerate(examples):
        turn = turns[example.group] = turns.get(example.group, -1) + 1
        order.append((turn, number))
    chosen: list[Example] = []
    tokens = 0
    for _, number in sorted(order):
        tokens += len(examples[number].tokens)
        if chosen and tokens > MOST_TOKENS:
            break
        chosen.append(examples[number])
    return chosen
