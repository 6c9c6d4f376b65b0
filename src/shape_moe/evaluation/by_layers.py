"""Teacher-forced figures of a model that is read layer by layer, and of selections of it as masks, in one reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from shape_moe.architectures.layered_model import LayeredModel
from shape_moe.evaluation.dense_reference import Outputs, RowLogits
from shape_moe.evaluation.held_out_set import HeldOutSet, scored_positions
from shape_moe.evaluation.teacher_forced import Sums, TeacherForced
from shape_moe.progress import SILENT, Progress
from shape_moe.pruning.masks import masked
from shape_moe.selection.selection import Selection
from shape_moe.tracing.hidden_states import HiddenStates
from shape_moe.tracing.streams import Stream, run_streams

if TYPE_CHECKING:
    from shape_moe.calibration.batches import Batch

DENSE = "dense"
"""Name of the stream of the model as it is."""


class MaskedStream(Stream):
    """A selection as a mask; up to the first layer that it names, it is the dense stream.

    Args:
        selection: what is kept. The stream's name is its digest.
    """

    def __init__(self, selection: Selection) -> None:
        super().__init__(selection.digest, min(selection.layers, default=0), DENSE)
        self.selection = selection

    @contextmanager
    def state(self, model: LayeredModel, layer: int) -> Iterator[None]:
        """The layer in memory under the mask."""
        del layer
        with masked(model.model, self.selection):
            yield


def pass_through_layers(
    model: LayeredModel,
    held_out: HeldOutSet,
    selections: Sequence[Selection],
    folder: Path,
    title: str = "Judging layer by layer",
    progress: Progress = SILENT,
) -> Mapping[str, HiddenStates]:
    """Take the dense model and each selection as a mask on it through every layer that is read.

    Args:
        model: the model; the weights of its layers are read once, whatever the number of selections.
        held_out: the examples.
        selections: what to judge beside the dense model; those that keep the same experts are taken once.
        folder: where hidden states lie, and where an interrupted run goes on.
        title: what progress calls it.
        progress: where to show it.

    Returns:
        What leaves the last layer: of the dense model under :data:`DENSE`, of each selection under its digest.

    Raises:
        UsageError: when a selection does not fit the model.
    """
    streams = {selection.digest: MaskedStream(selection) for selection in selections}
    batches = [batch for _, batch in held_out.batches()]
    return run_streams(model, batches, [Stream(DENSE), *streams.values()], folder, title=title, progress=progress)


def sums_behind_layers(
    model: LayeredModel, held_out: HeldOutSet, states: Mapping[str, HiddenStates]
) -> dict[str, TeacherForced]:
    """Compare what left the last layer with the dense model's, in one reading of the head.

    Args:
        model: the model.
        held_out: the examples.
        states: what :func:`pass_through_layers` gave.

    Returns:
        The sums of each stream by its name.

    Raises:
        ShapeMoeError: when logits are not finite.
    """
    sums = {name: Sums(held_out) for name in (DENSE, *states)}
    with model.head():
        for number, (positions, batch) in enumerate(held_out.batches()):
            dense = outputs_behind_layers(model, batch, states[DENSE], number)
            sums[DENSE].add(positions, batch, dense, None)
            for name in states:
                if name != DENSE:
                    outputs = outputs_behind_layers(model, batch, states[name], number)
                    sums[name].add(positions, batch, outputs, dense.logits.__getitem__)
    return {name: of.result() for name, of in sums.items()}


def sums_beside_dense(
    model: LayeredModel, held_out: HeldOutSet, dense: HiddenStates, other: Callable[[int, Batch], Outputs]
) -> TeacherForced:
    """Compare another model with the dense one.

    Args:
        model: the dense model.
        held_out: the examples.
        dense: what left its last layer.
        other: what the other model says at the scored positions of a batch, by its number.

    Raises:
        ShapeMoeError: when logits are not finite.
    """
    sums = Sums(held_out)
    with model.head():
        for number, (positions, batch) in enumerate(held_out.batches()):
            said = outputs_behind_layers(model, batch, dense, number).logits
            rows: RowLogits = said.__getitem__
            sums.add(positions, batch, other(number, batch), rows)
    return sums.result()


def outputs_behind_layers(model: LayeredModel, batch: Batch, states: HiddenStates, number: int) -> Outputs:
    """What is said at the scored positions of a batch whose hidden states have left the last layer."""
    scored = scored_positions(batch)
    columns = scored.any(dim=0).nonzero()[:, 0]
    logits = model.logits(states.take(number), batch.attention_mask, columns)
    return Outputs(logits[scored[:, columns].to(logits.device)])
