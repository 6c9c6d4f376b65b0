"""The judgement of a model that is read layer by layer: dense and pruned through each layer, in one reading."""

from __future__ import annotations

from collections.abc import Sequence

from shape_moe.architectures.layered_model import LayeredModel
from shape_moe.calibration.parts import Parts
from shape_moe.calibration.records import DataOptions
from shape_moe.errors import ShapeMoeError
from shape_moe.evaluation.by_layers import compare_by_layers
from shape_moe.evaluation.conclusion import conclude
from shape_moe.evaluation.outcomes import Seen
from shape_moe.jobs.held_out import held_out_set
from shape_moe.jobs.judgement import Judgement, JudgementOptions, no_judgement, why_parts_unmeasured
from shape_moe.jobs.seen_examples import seen_records
from shape_moe.jobs.session import ModelSession
from shape_moe.selection.selection import Selection
from shape_moe.units import capitalised, counted, readable_size

_LIKELIHOOD_ALONE = (
    "Judged layer by layer, by the likelihood of the right answers; for free answers, tool calls and general prompts "
    "the model would have to be in memory."
)


def judge_layer_by_layer(
    session: ModelSession,
    parts: Parts,
    data: DataOptions,
    selection: Selection,
    options: JudgementOptions,
    remarks: Sequence[str] = (),
) -> Judgement:
    """Judge a selection as a mask, dense and masked hidden states going through each layer together.

    Args:
        session: names the model and how it runs.
        parts: the records to report by, and why some classes have none.
        data: where they come from.
        selection: what the written model keeps.
        options: see :class:`shape_moe.jobs.judgement.JudgementOptions`.
        remarks: what else a reader should know.
    """
    assert session.snapshot is not None
    reasons = why_parts_unmeasured(parts)
    if not parts.report:
        return no_judgement(f"{capitalised('; '.join(reasons))}.", options)
    progress, asked = session.progress, session.options
    model = LayeredModel(session.snapshot, device=asked.device, dtype=asked.dtype)
    try:
        maker, again = session.calibrator_of(parts.report, data), seen_records(parts)
        held_out = held_out_set(session, maker, "the judgement", model=model.model)
        known = session.calibrator_of(again, data) if again else None
        calibrated = held_out_set(session, known, "examples that calibrated", model=model.model) if known else None
        everything = held_out if calibrated is None else held_out.with_others(calibrated)
    except ShapeMoeError as error:  # answers that are missing cannot be written here
        return no_judgement(str(error), options)
    session.unload()
    progress.note(
        f"To be judged, dense and pruned, layer by layer: {counted(len(held_out.examples), 'example')}; for that the "
        f"weights are read once more ({readable_size(session.snapshot.total_bytes)}); --no-judge leaves it out."
    )
    with progress.phase("Judging layer by layer", model.num_layers, "layer") as advance:
        dense, pruned = compare_by_layers(model, everything, [selection], advance)
    count, seen = len(held_out.examples), None
    if calibrated is not None:
        seen = Seen(calibrated.groups, dense.part(count, None), pruned.part(count, None), calibrated.answered())
        dense, pruned = dense.part(0, count), pruned.part(0, count)
    notes = [*(f"Not measured: {reason}." for reason in reasons), f"{parts.sentence}.", *remarks, _LIKELIHOOD_ALONE]
    return Judgement(conclude(held_out, dense, pruned, None, max_drop=options.max_drop, notes=notes, seen=seen))
