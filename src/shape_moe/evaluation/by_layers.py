"""Teacher-forced figures of a model that is read layer by layer, and of selections of it as masks, in one reading."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from shape_moe.architectures.layered_model import LayeredModel
from shape_moe.evaluation.dense_reference import Outputs
from shape_moe.evaluation.held_out_set import HeldOutSet, scored_positions
from shape_moe.evaluation.teacher_forced import Sums, TeacherForced
from shape_moe.progress import Advance
from shape_moe.pruning.masks import masked
from shape_moe.selection.selection import Selection
from shape_moe.tracing.hidden_states import HiddenStates

if TYPE_CHECKING:
    from shape_moe.calibration.batches import Batch


def compare_by_layers(
    model: LayeredModel, held_out: HeldOutSet, selections: Sequence[Selection], advance: Advance = lambda _: None
) -> list[TeacherForced]:
    """Take the dense model and each selection as a mask on it through every layer that is read.

    Args:
        model: the model; its weights are read once, whatever the number of selections.
        held_out: the examples.
        selections: what to judge beside the dense model.
        advance: called with the number of layers done.

    Returns:
        The sums of the dense model, and those of each selection beside it.

    Raises:
        ShapeMoeError: when logits are not finite.
        UsageError: when a selection does not fit the model.
    """
    subjects = [None, *selections]
    todo = list(held_out.batches())
    with tempfile.TemporaryDirectory(prefix="shape-moe-") as place:
        streams = [_states(model, todo, Path(place), number) for number in range(len(subjects))]
        with model.embeddings():
            for number, (_, batch) in enumerate(todo):
                entering = model.enter(batch.input_ids, batch.attention_mask)
                for states in streams:
                    states.put(number, entering)
        for states in streams:
            states.turn(0)
        for layer in model.layers():
            for subject, states in zip(subjects, streams, strict=True):
                with _as(model, subject):
                    for number, (_, batch) in enumerate(todo):
                        states.put(number, model.advance(states.take(number), batch.attention_mask))
                states.turn(layer + 1)
                states.tidy()
            advance(1)
        return _compared(model, held_out, todo, streams)


def _compared(
    model: LayeredModel, held_out: HeldOutSet, todo: list[tuple[list[int], Batch]], streams: list[HiddenStates]
) -> list[TeacherForced]:
    sums = [Sums(held_out) for _ in streams]
    with model.head():
        for number, (positions, batch) in enumerate(todo):
            said = None
            for states, of in zip(streams, sums, strict=True):
                outputs = _outputs(model, batch, states, number)
                of.add(positions, batch, outputs, said.logits.__getitem__ if said is not None else None)
                said = outputs if said is None else said
    return [of.result() for of in sums]


def _outputs(model: LayeredModel, batch: Batch, states: HiddenStates, number: int) -> Outputs:
    """What is said at the scored positions of a batch whose hidden states have left the last layer."""
    scored = scored_positions(batch)
    columns = scored.any(dim=0).nonzero()[:, 0]
    logits = model.logits(states.take(number), batch.attention_mask, columns)
    return Outputs(logits[scored[:, columns].to(logits.device)])


def _states(model: LayeredModel, todo: list[tuple[list[int], Batch]], place: Path, number: int) -> HiddenStates:
    folder = place / str(number)
    folder.mkdir()
    hidden = model.model.config.get_text_config().hidden_size
    return HiddenStates([(*batch.input_ids.shape, hidden) for _, batch in todo], model.model.dtype, folder)


@contextmanager
def _as(model: LayeredModel, subject: Selection | None) -> Iterator[None]:
    """The layer in memory as it is, or under a mask."""
    if subject is None:
        yield
        return
    with masked(model.model, subject):
        yield
