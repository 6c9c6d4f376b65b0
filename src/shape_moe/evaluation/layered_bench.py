"""The bench for a model larger than memory: the dense model and many selections in one reading of the weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shape_moe.architectures.layered_model import LayeredModel
from shape_moe.evaluation.by_layers import DENSE, pass_through_layers, sums_behind_layers, sums_beside_dense
from shape_moe.evaluation.comparison import Comparison
from shape_moe.evaluation.dense_reference import Outputs, scored_outputs
from shape_moe.evaluation.held_out_set import HeldOutSet, scored_positions
from shape_moe.evaluation.teacher_forced import TeacherForced
from shape_moe.progress import SILENT, Advance, Progress
from shape_moe.selection.selection import Selection
from shape_moe.tracing.hidden_states import HiddenStates
from shape_moe.tracing.streams import is_begun
from shape_moe.units import counted, readable_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shape_moe.calibration.batches import Batch

_STREAMS = "layers.partial"
TOGETHER = 16
"""So many selections at most go through the layers together: their hidden states lie on disk meanwhile."""


class LayeredBench(Comparison):
    """Judges selections as masks on a model of which one layer is in memory, by likelihood alone.

    Args:
        model: the model. Nothing of it is read before selections are judged.
        held_out: the examples.
        seed: draws the resamples of all intervals.
        comparisons: how many candidates the best is picked from.
        folder: where sums and hidden states are kept for a later run, None for nowhere.
        progress: where to show progress, and what each reading of the weights is for.

    Attributes:
        readings: how often the weights were read.
    """

    def __init__(
        self,
        model: LayeredModel,
        held_out: HeldOutSet,
        *,
        seed: int = 0,
        comparisons: int = 1,
        folder: Path | None = None,
        progress: Progress = SILENT,
    ) -> None:
        super().__init__(held_out, seed=seed, comparisons=comparisons, folder=folder, progress=progress)
        self.model, self.progress, self.readings = model, progress, 0
        self._scratch = tempfile.TemporaryDirectory(prefix="shape-moe-") if folder is None else None
        self._folder = folder if folder is not None else Path(self._scratch.name if self._scratch else "")
        self._dense: HiddenStates | None = None

    def close(self) -> None:
        """Let go of hidden states, but for those that an interrupted reading goes on from."""
        self._dense = None
        if not is_begun(self._folder / _STREAMS):
            shutil.rmtree(self._folder / _STREAMS, ignore_errors=True)
        if self._scratch is not None:
            self._scratch.cleanup()

    def unload(self) -> None:
        """Nothing: the model is not in memory."""

    @property
    def dense_sums(self) -> TeacherForced:
        """Teacher-forced sums of the dense model."""
        if DENSE not in self._sums:
            self._read([])
        return TeacherForced.from_items(self._sums[DENSE])

    def sums(self, subject: Selection | PreTrainedModel, advance: Advance = lambda _: None) -> TeacherForced:
        """Teacher-forced sums; a selection that :meth:`prepare` was not told of costs a reading of its own.

        Args:
            subject: a selection, or another model in memory.
            advance: called with the number of examples done.
        """
        if not isinstance(subject, Selection):
            return self._beside_dense(subject, advance)
        self.prepare([subject])
        advance(len(self.held_out.examples))
        return TeacherForced.from_items(self._sums[subject.digest])

    def prepare(self, selections: Sequence[Selection]) -> None:
        """Judge all selections that are not judged yet, :data:`TOGETHER` of them in each reading of the weights."""
        todo = list({s.digest: s for s in selections if s.digest not in self._sums}.values())
        readings = -(-len(todo) // TOGETHER)
        if todo:
            size = readable_size(self.model.snapshot.total_bytes)
            self.progress.note(
                f"{counted(len(todo), 'selection')} and the dense model are judged layer by layer on "
                f"{counted(len(self.held_out.examples), 'example')}: the weights ({size}) are read "
                f"{counted(readings, 'time')} for that."
            )
        for number in range(readings):
            self._read(todo[number * TOGETHER : (number + 1) * TOGETHER])

    def _beside_dense(self, other: PreTrainedModel, advance: Advance) -> TeacherForced:
        """The sums of another model beside the dense one, whose hidden states are there from the last reading."""
        if self._dense is None:
            self._read([])
        assert self._dense is not None

        def said(_number: int, batch: Batch) -> Outputs:
            advance(len(batch.examples))
            return scored_outputs(other, batch, scored_positions(batch))

        return sums_beside_dense(self.model, self.held_out, self._dense, said)

    def _read(self, selections: Sequence[Selection]) -> None:
        self._dense = None
        states = pass_through_layers(
            self.model, self.held_out, selections, self._folder / _STREAMS, progress=self.progress
        )
        self.readings += 1
        for name, sums in sums_behind_layers(self.model, self.held_out, states).items():
            if name not in self._sums:
                self._sums.put(name, sums.to_items())
        self._dense = states[DENSE]
        self._dense.keep_alone()
