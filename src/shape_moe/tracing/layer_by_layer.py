"""The engine for models that are larger than memory: one decoder layer at a time, all batches through it."""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.layered_model import LayeredModel
from shape_moe.architectures.loading import release_memory
from shape_moe.calibration.batches import Batch, batches
from shape_moe.calibration.responses import pad_token_id
from shape_moe.errors import CheckpointError, ShapeMoeError, first_line
from shape_moe.interrupts import DeferredInterrupt
from shape_moe.tracing.engine import Work, register
from shape_moe.tracing.hidden_states import HiddenStates
from shape_moe.tracing.trace import Trace
from shape_moe.tracing.whole_model import UNFINISHED, trace_of, tracer_for
from shape_moe.units import readable_size
from shape_moe.workspace import write_json

if TYPE_CHECKING:
    import torch

    from shape_moe.tracing.transformers_model import ModelTracer

_PLACE = f"{UNFINISHED}-layers"
_DONE = "done.json"
_SAVE_SHARE = 0.05
"""Saving may take this share of the time."""


def is_unfinished(folder: Path | None) -> bool:
    """Whether a trace that was interrupted was made layer by layer."""
    return folder is not None and (folder / _PLACE / _DONE).is_file()


@register("stream", shares_model=True)
class LayerByLayer:
    """Traces a model of which one decoder layer (and the next, which is being read) is in memory.

    The same recorders see the same calls as in the engine that holds the whole model, so the trace is the same, bit for
    bit on the same device. What is finished is saved after a layer, whenever that takes little of the time: the hidden
    states that enter the next layer, and the sums of the finished ones.

    Args:
        work: the model and the examples.
    """

    def __init__(self, work: Work) -> None:
        self.work = work

    def fill(self, folder: Path | None) -> Trace:
        """Tokenise and trace; see :class:`shape_moe.tracing.engine.Filler`.

        Raises:
            ShapeMoeError: when a batch cannot be traced; the message names its records.
            DataError: when no record can be used.
        """
        work = self.work
        assert work.snapshot is not None, "a live model is in memory already"
        examples = work.ranks.examples(work.examples, lambda: work.examples.run(work.answerer, folder))
        work.release()
        release_memory()
        model = LayeredModel(work.snapshot, device=work.device, dtype=work.dtype, note=work.progress.note)
        tracer = tracer_for(work, model.model, examples)
        pad_id = pad_token_id(tracer.model, work.examples.tokeniser)
        todo = work.ranks.share(list(batches(examples, work.examples.options.batch_size, pad_id)))
        with ExitStack() as stack:
            scratch = folder / _PLACE if folder is not None else Path(stack.enter_context(_temporary()))
            scratch.mkdir(exist_ok=True)
            _Pass(work, model, tracer, todo, scratch).run()
        work.progress.note(
            f"{readable_size(model.bytes_read)} of weights were read, each byte once for all calibration examples."
        )
        return trace_of(work, tracer)


def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="shape-moe-")


class _Pass:
    """One pass over the layers.

    Args:
        work: what is asked.
        model: the model.
        tracer: records its layers.
        todo: the batches.
        folder: where hidden states and finished sums lie.
    """

    def __init__(self, work: Work, model: LayeredModel, tracer: ModelTracer, todo: list[Batch], folder: Path) -> None:
        self.work, self.model, self.tracer, self.todo, self.folder = work, model, tracer, todo, folder
        hidden = model.model.config.get_text_config().hidden_size
        shapes = [(*batch.input_ids.shape, hidden) for batch in todo]
        self.states = HiddenStates(shapes, model.model.dtype, folder)
        self.last = max(tracer.layers)
        self._saved: set[int] = set()
        self._next_save = 0.0

    def run(self) -> None:
        """Take all batches through all layers that are not done yet."""
        done, layers = self._go_on(), self.last + 1
        phase = self.work.progress.phase("Tracing layer by layer", layers - done, "layer")
        with phase as advance, self.tracer.attached(), self._stop() as stop:
            if done == 0:
                self._enter()
            for layer in self.model.layers(done, layers):
                self._layer(layer)
                advance(1)
                if layer < self.last:
                    self._save(layer + 1, now=stop.noted)
                    stop.check()
        self.tracer.batches = len(self.todo)

    def _stop(self) -> DeferredInterrupt:
        return DeferredInterrupt(
            lambda: self.work.progress.note("Stopping after this layer; press Ctrl-C again to stop at once.")
        )

    def _enter(self) -> None:
        with self.model.embeddings():
            for number, batch in enumerate(self.todo):
                self.states.put(number, self.model.enter(batch.input_ids, batch.attention_mask))
        self.states.turn(0)

    def _layer(self, layer: int) -> None:
        for number, batch in enumerate(self.todo):
            hidden = self.states.take(number)
            self.states.put(number, self._through(layer, batch, hidden))
        self.states.turn(layer + 1)

    def _through(self, layer: int, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        import torch

        try:
            with self.tracer.recording(batch, layer):
                return self.model.advance(hidden, batch.attention_mask)
        except torch.OutOfMemoryError:
            raise
        except (ShapeMoeError, RuntimeError) as error:
            names = ", ".join(example.where for example in self._failing(batch, hidden))
            without = " Without --stream, --skip-bad leaves it out." if self.work.examples.options.skip_bad else ""
            raise ShapeMoeError(f"Tracing failed at {names}: {first_line(error)}{without}") from error

    def _failing(self, batch: Batch, hidden: torch.Tensor) -> list[Any]:
        """The examples that fail by themselves, all of them where none does."""
        bad = []
        for row, example in enumerate(batch.examples):
            length = len(example.tokens)
            try:
                found = self.model.advance(hidden[row : row + 1], batch.attention_mask[row : row + 1])
                fails = not bool(found[0, :length].isfinite().all())
            except RuntimeError:
                fails = True
            if fails:
                bad.append(example)
        return bad or list(batch.examples)

    def _go_on(self) -> int:
        """Take up what an interrupted run left; gives the number of layers that are done."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        file = self.folder / _DONE
        if not file.is_file():
            return 0
        damaged = f"{self.folder} holds a damaged unfinished trace; delete that folder."
        try:
            done = int(json.loads(file.read_text(encoding="utf-8"))["layers"])
            self._saved = {layer for layer in self.tracer.layers if layer < done}
            for recorder in self.tracer.recorders:
                if recorder.layer in self._saved:
                    recorder.restore(load_file(self._sums(recorder.layer)))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(damaged) from error
        self.states.restore(done)
        return done

    def _save(self, done: int, *, now: bool) -> None:
        """Save what is finished, unless that would take too much of the time."""
        from safetensors.numpy import save_file

        began = time.monotonic()
        if not now and began < self._next_save:
            return
        for recorder in self.tracer.recorders:
            if recorder.layer < done and recorder.layer not in self._saved:
                save_file(recorder.state(), self._sums(recorder.layer))
                self._saved.add(recorder.layer)
        self.states.save()
        write_json(self.folder / _DONE, {"layers": done})
        self.states.tidy()
        ended = time.monotonic()
        self._next_save = ended + (ended - began) / _SAVE_SHARE

    def _sums(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:03d}.safetensors"
