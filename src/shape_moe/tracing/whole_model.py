"""The engine that holds the whole Transformers model: batches through it, and what lets an interrupted run go on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shape_moe.calibration.batches import Batch, batches
from shape_moe.calibration.responses import pad_token_id
from shape_moe.errors import CheckpointError, DataError, ShapeMoeError, first_line
from shape_moe.interrupts import DeferredInterrupt
from shape_moe.tracing.classes import classes_of
from shape_moe.tracing.engine import Work, register
from shape_moe.tracing.statistics import statistics
from shape_moe.tracing.trace import Trace
from shape_moe.units import counted
from shape_moe.workspace import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shape_moe.calibration.examples import Example
    from shape_moe.tracing.transformers_model import ModelTracer

UNFINISHED = "so-far"
"""Names of what an unfinished trace keeps in its folder begin so."""
NO_REPLACEMENT = "it was not asked for (--no-replacement)"
_SAVE_SECONDS = 120.0
_STATE = "state.safetensors"


@register("transformers", shares_model=True)
class WholeModel:
    """Traces a live model.

    The running sums are saved as they are, in float64, and go on from there, batch after batch in the same order: an
    interrupted trace is the undisturbed one, byte for byte.

    Args:
        work: the model and the examples.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.skipped = work.examples.skipped

    def fill(self, folder: Path | None) -> Trace:
        """Answer, tokenise and trace; see :class:`shape_moe.tracing.engine.Filler`.

        Raises:
            ShapeMoeError: when a batch cannot be traced; the message names the record.
            DataError: when no record could be traced.
        """
        work = self.work
        examples = work.ranks.examples(work.examples, lambda: work.examples.run(work.answerer, folder))
        tracer = tracer_for(work, work.model(), examples)
        done = self._go_on(tracer, folder)
        pad_id = pad_token_id(tracer.model, work.examples.tokeniser)
        todo = work.ranks.share(list(batches(examples, work.examples.options.batch_size, pad_id)))[done:]
        tokens = sum(len(example.tokens) for batch in todo for example in batch.examples)
        if done:
            work.progress.note(f"{done:,} of {counted(done + len(todo), 'batch', 'batches')} already done.")
        saved = time.monotonic()
        with work.progress.phase("Tracing", tokens, "token") as advance, tracer.attached(), self._stop() as stop:
            for number, batch in enumerate(todo, start=done + 1):
                self._trace_batch(tracer, batch)
                advance(sum(len(example.tokens) for example in batch.examples))
                due = stop.noted or time.monotonic() - saved > _SAVE_SECONDS
                if folder is not None and due and tracer.batches:
                    self._save(tracer, folder, number)
                    saved = time.monotonic()
                stop.check()
        if not tracer.batches:
            raise DataError(f"No record of {work.examples.data.name} could be traced.")
        return trace_of(work, tracer)

    def _stop(self) -> DeferredInterrupt:
        return DeferredInterrupt(
            lambda: self.work.progress.note("Stopping after this batch; press Ctrl-C again to stop at once.")
        )

    def _trace_batch(self, tracer: ModelTracer, batch: Batch) -> None:
        import torch

        healthy = self._without_bad(tracer, batch) if self.work.examples.options.skip_bad else batch
        if healthy is None:
            return
        try:
            tracer.add(healthy, logits_to_keep=1)
        except torch.OutOfMemoryError:
            raise
        except (ShapeMoeError, RuntimeError) as error:
            bad = [row for row in range(len(healthy.examples)) if tracer.failure(healthy.rows([row])) is not None]
            names = [healthy.examples[row].where for row in bad] or [example.where for example in healthy.examples]
            raise ShapeMoeError(f"Tracing failed at {', '.join(names)}: {first_line(error)}") from error

    def _without_bad(self, tracer: ModelTracer, batch: Batch) -> Batch | None:
        """The batch without the examples whose forward pass fails, found by running them unrecorded first."""
        if tracer.failure(batch) is None:
            return batch
        good = []
        for row, example in enumerate(batch.examples):
            reason = tracer.failure(batch.rows([row]))
            if reason is None:
                good.append(row)
            else:
                self.skipped[example.where] = reason
        return batch.rows(good) if good else None

    def _go_on(self, tracer: ModelTracer, folder: Path | None) -> int:
        """Take up what an interrupted run left; gives the number of batches that are done."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        file = folder / f"{UNFINISHED}.json" if folder is not None else None
        if file is None or not file.is_file():
            return 0
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            done = int(kept["batches"])
            state = load_file(file.with_name(f"{UNFINISHED}-{done}") / _STATE)
            tracer.restore(state, int(kept["traced"]))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{file.parent} holds a damaged unfinished trace; delete that folder.") from error
        self.skipped |= kept["skipped"]
        return done

    def _save(self, tracer: ModelTracer, folder: Path, done: int) -> None:
        """Save the sums; ``so-far.json`` names the folder that is complete."""
        from safetensors.numpy import save_file

        place = folder / f"{UNFINISHED}-{done}"
        place.mkdir(exist_ok=True)
        save_file(tracer.state(), place / _STATE)
        write_json(folder / f"{UNFINISHED}.json", {"batches": done, "traced": tracer.batches, "skipped": self.skipped})
        for old in folder.iterdir():
            if old.name.startswith(f"{UNFINISHED}-") and old.name != place.name:
                shutil.rmtree(old)


def tracer_for(work: Work, model: PreTrainedModel, examples: Sequence[Example]) -> ModelTracer:
    """What records a model over these examples, by their classes."""
    from shape_moe.tracing.transformers_model import ModelTracer

    recorded = [s for s in statistics().values() if work.replacement or not s.next_choice]
    tracer = ModelTracer(model, recorded, classes_of(examples))
    if not work.replacement:
        tracer.left_out["replacement"] = NO_REPLACEMENT
    for name, reason in tracer.left_out.items():
        work.progress.note(f"The trace is made without {name}: {reason}.")
    return tracer


def trace_of(work: Work, tracer: ModelTracer) -> Trace:
    """The trace of what was recorded."""
    info = work.describe(tracer.moe, tracer.layers, tracer.implementation, tracer.dtype, "transformers")
    info = replace(info, classes=tracer.classes, left_out=tracer.left_out)
    return Trace(info, tracer.statistics(), tracer.coalitions())


def is_unfinished(folder: Path | None) -> bool:
    """Whether a trace of a whole model was interrupted."""
    return folder is not None and (folder / f"{UNFINISHED}.json").is_file()


def remove_unfinished(folder: Path) -> None:
    """Delete what an unfinished trace keeps in its folder."""
    for leftover in list(folder.iterdir()):
        if leftover.name.startswith(f"{UNFINISHED}-"):
            shutil.rmtree(leftover)
    (folder / f"{UNFINISHED}.json").unlink(missing_ok=True)
