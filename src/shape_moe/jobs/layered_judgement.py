"""The judgement of models that are read layer by layer: dense and pruned through each layer, in one reading."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shape_moe.calibration.parts import Parts
from shape_moe.calibration.records import DataOptions
from shape_moe.errors import ShapeMoeError
from shape_moe.evaluation.conclusion import conclude
from shape_moe.evaluation.layered_bench import LayeredBench
from shape_moe.evaluation.outcomes import Seen
from shape_moe.jobs.held_out import held_out_set
from shape_moe.jobs.judgement import Judgement, JudgementOptions, no_judgement, why_parts_unmeasured
from shape_moe.jobs.search import open_layers
from shape_moe.jobs.seen_examples import seen_records
from shape_moe.jobs.session import ModelSession
from shape_moe.selection.selection import Selection
from shape_moe.units import capitalised

_LIKELIHOOD_ALONE = (
    "Judged layer by layer, by the likelihood of the right answers; for free answers, tool calls and general prompts "
    "the model would have to be in memory."
)


def judge_layer_by_layer(
    session: ModelSession,
    parts: Parts,
    data: DataOptions,
    selections: Sequence[Selection],
    options: JudgementOptions,
    remarks: Sequence[str] = (),
    folder: Path | None = None,
) -> list[Judgement]:
    """Judge selections as masks, dense and masked hidden states going through each layer together.

    Args:
        session: names the model and how it runs.
        parts: the records to report by, and why some classes have none.
        data: where they come from.
        selections: what the written models keep.
        options: see :class:`shape_moe.jobs.judgement.JudgementOptions`.
        remarks: what else a reader should know.
        folder: where an interrupted judgement goes on, None for nowhere.
    """
    assert session.snapshot is not None
    reasons = why_parts_unmeasured(parts)
    if not parts.report:
        return [no_judgement(f"{capitalised('; '.join(reasons))}.", options)] * len(selections)
    try:
        model = open_layers(session)
        maker, again = session.calibrator_of(parts.report, data), seen_records(parts)
        held_out = held_out_set(session, maker, "the judgement", model=model.model)
        known = session.calibrator_of(again, data) if again else None
        calibrated = held_out_set(session, known, "examples that calibrated", model=model.model) if known else None
        everything = held_out if calibrated is None else held_out.with_others(calibrated)
    except ShapeMoeError as error:  # answers that are missing cannot be written here
        return [no_judgement(str(error), options)] * len(selections)
    session.unload()
    session.progress.note("What is kept is judged; --no-judge leaves it out.")
    with LayeredBench(model, everything, folder=folder, progress=session.progress) as bench:
        bench.prepare(selections)
        dense, pruned = bench.dense_sums, [bench.sums(selection) for selection in selections]
    notes = [*(f"Not measured: {reason}." for reason in reasons), f"{parts.sentence}.", *remarks, _LIKELIHOOD_ALONE]
    count, found = len(held_out.examples), []
    for sums in pruned:
        seen = None
        if calibrated is not None:
            seen = Seen(calibrated.groups, dense.part(count, None), sums.part(count, None), calibrated.answered())
        ours, theirs = sums.part(0, count), dense.part(0, count)
        verdict = conclude(held_out, theirs, ours, None, max_drop=options.max_drop, notes=notes, seen=seen)
        found.append(Judgement(verdict))
    return found
