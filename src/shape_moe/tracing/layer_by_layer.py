"""The engine for models that are larger than memory: one decoder layer at a time, all batches through it."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from shape_moe.architectures.layered_model import LayeredModel
from shape_moe.architectures.loading import release_memory
from shape_moe.calibration.batches import Batch, batches
from shape_moe.calibration.responses import pad_token_id
from shape_moe.errors import ShapeMoeError, first_line
from shape_moe.tracing.engine import Work, register
from shape_moe.tracing.streams import Stream, is_begun, run_streams
from shape_moe.tracing.trace import Trace
from shape_moe.tracing.whole_model import UNFINISHED, trace_of, tracer_for
from shape_moe.units import readable_size

if TYPE_CHECKING:
    import torch

    from shape_moe.calibration.examples import Example
    from shape_moe.tracing.transformers_model import ModelTracer

_PLACE = f"{UNFINISHED}-layers"


def is_unfinished(folder: Path | None) -> bool:
    """Whether a trace that was interrupted was made layer by layer."""
    return folder is not None and is_begun(folder / _PLACE)


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
            stack.enter_context(tracer.attached())
            run_streams(
                model,
                todo,
                [_Traced(tracer, skips_bad=work.examples.options.skip_bad)],
                scratch,
                layers=max(tracer.layers) + 1,
                sums=_RecorderSums(tracer),
                title="Tracing layer by layer",
                progress=work.progress,
            )
        tracer.batches = len(todo)
        work.progress.note(
            f"{readable_size(model.bytes_read)} of weights were read, each byte once for all calibration examples."
        )
        return trace_of(work, tracer)


def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="shape-moe-")


class _Traced(Stream):
    """The dense model, recorded.

    Args:
        tracer: records its layers.
        skips_bad: whether the user wants failing examples left out, which this engine cannot do.
    """

    def __init__(self, tracer: ModelTracer, *, skips_bad: bool) -> None:
        super().__init__("dense")
        self.tracer, self.skips_bad = tracer, skips_bad

    def through(self, model: LayeredModel, layer: int, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Record the layer on its way.

        Raises:
            ShapeMoeError: when the batch cannot be traced; the message names its records.
        """
        import torch

        try:
            with self.tracer.recording(batch, layer):
                return super().through(model, layer, batch, hidden)
        except torch.OutOfMemoryError:
            raise
        except (ShapeMoeError, RuntimeError) as error:
            names = ", ".join(example.where for example in _failing(model, batch, hidden))
            without = " Without --stream, --skip-bad leaves it out." if self.skips_bad else ""
            raise ShapeMoeError(f"Tracing failed at {names}: {first_line(error)}{without}") from error


def _failing(model: LayeredModel, batch: Batch, hidden: torch.Tensor) -> list[Example]:
    """The examples that fail by themselves in the layer in memory, all of them where none does."""
    bad = []
    for row, example in enumerate(batch.examples):
        length = len(example.tokens)
        try:
            found = model.advance(hidden[row : row + 1], batch.attention_mask[row : row + 1])
            fails = not bool(found[0, :length].isfinite().all())
        except RuntimeError:
            fails = True
        if fails:
            bad.append(example)
    return bad or list(batch.examples)


class _RecorderSums:
    """The sums of the layers that are recorded, a file each.

    Args:
        tracer: holds the recorders.
    """

    def __init__(self, tracer: ModelTracer) -> None:
        self.tracer = tracer
        self._saved: set[int] = set()

    def save(self, folder: Path, done: int) -> None:
        """Save the layers that were finished since the last time."""
        from safetensors.numpy import save_file

        for recorder in self.tracer.recorders:
            if recorder.layer < done and recorder.layer not in self._saved:
                save_file(recorder.state(), _file_of(folder, recorder.layer))
                self._saved.add(recorder.layer)

    def restore(self, folder: Path, done: int) -> None:
        """Take up the layers that are finished; see :class:`shape_moe.tracing.streams.Sums`."""
        from safetensors.numpy import load_file

        self._saved = {layer for layer in self.tracer.layers if layer < done}
        for recorder in self.tracer.recorders:
            if recorder.layer in self._saved:
                recorder.restore(load_file(_file_of(folder, recorder.layer)))


def _file_of(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:03d}.safetensors"
