"""The layer engine: a model that is read layer by layer, and several streams of hidden states through every layer.

A stream is what becomes of all batches in one state of the model: as it is, with experts masked, with weights replaced.
Each layer is read once, all streams go through it, and the next one takes its place; so what is compared costs one
reading of the weights, however many states are compared. A stream may branch off another one at a layer: up to there
both are the same. Where all streams stand is saved after a layer, and a run that was killed goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from shape_moe.errors import CheckpointError
from shape_moe.interrupts import DeferredInterrupt
from shape_moe.progress import SILENT, Progress
from shape_moe.tracing.hidden_states import HiddenStates
from shape_moe.workspace import write_json

if TYPE_CHECKING:
    import torch

    from shape_moe.architectures.layered_model import LayeredModel
    from shape_moe.calibration.batches import Batch

_DONE = "done.json"
SAVE_SHARE = 0.05
"""Saving may take this share of the time."""
Entering = Callable[[str, int], "torch.Tensor"]
"""The hidden states [B, T, H] with which a stream, by its name, enters the layer, of one batch by its number."""


class Stream:
    """One state of the model, and what becomes of the hidden states of all batches in it.

    Args:
        name: its name among the streams of a run.
        start: the first decoder layer that it goes through by itself.
        parent: name of the stream whose hidden states enter that layer; None for those of the input embeddings, which
            only a stream that starts at layer 0 can take.
    """

    def __init__(self, name: str, start: int = 0, parent: str | None = None) -> None:
        self.name, self.start, self.parent = name, start, parent

    @contextmanager
    def state(self, model: LayeredModel, layer: int) -> Iterator[None]:
        """The layer in memory as this stream finds it; the dense one changes nothing."""
        del model, layer
        yield

    def through(self, model: LayeredModel, layer: int, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, H] after the layer in memory, on the device that computes."""
        del layer
        return model.advance(hidden, batch.attention_mask)


class Sums(Protocol):
    """What a run adds up beside its hidden states, and has to find again when it goes on."""

    def save(self, folder: Path, done: int) -> None:
        """Save what the first ``done`` layers gave; what was saved before need not be saved again."""

    def restore(self, folder: Path, done: int) -> None:
        """Take up what :meth:`save` left.

        Raises:
            OSError, ValueError, KeyError, TypeError, SafetensorError: when it is damaged.
        """


def run_streams(
    model: LayeredModel,
    batches: Sequence[Batch],
    streams: Sequence[Stream],
    folder: Path,
    *,
    layers: int | None = None,
    sums: Sums | None = None,
    on_layer: Callable[[int, Entering], None] = lambda _layer, _entering: None,
    title: str = "Layer by layer",
    progress: Progress = SILENT,
) -> Mapping[str, HiddenStates]:
    """Take all batches through the layers in all streams, reading each layer once.

    Args:
        model: the model; one layer of it, and the next, are in memory at a time.
        batches: what goes through.
        streams: the states of the model; a branch stands behind its parent.
        folder: where hidden states lie, and where a run that was interrupted finds what it has done. What another run
            left there is deleted.
        layers: how many decoder layers to go through, None for all.
        sums: what is added up on the way.
        on_layer: called when a layer is in memory, before any stream goes through it, with its index and the hidden
            states that enter it.
        title: what progress calls the work.
        progress: where to show it.

    Returns:
        By the stream's name, the hidden states behind the last layer.

    Raises:
        CheckpointError: when what an interrupted run left is damaged.
        KeyboardInterrupt: after the layer in which Ctrl-C was pressed, when all is saved.
        ValueError: for a branch whose parent does not stand before it.
    """
    run = _Run(model, batches, streams, folder, model.num_layers if layers is None else layers, sums)
    run.carry_out(on_layer, title, progress)
    return run.states


def is_begun(folder: Path) -> bool:
    """Whether a run that was interrupted can go on in a folder."""
    return (folder / _DONE).is_file()


class _Run:
    """All batches on their way; see :func:`run_streams`."""

    def __init__(
        self,
        model: LayeredModel,
        batches: Sequence[Batch],
        streams: Sequence[Stream],
        folder: Path,
        layers: int,
        sums: Sums | None,
    ) -> None:
        _check(streams)
        self.model, self.batches, self.streams, self.folder = model, batches, streams, folder
        self.layers, self.sums = layers, sums
        hidden = model.model.config.get_text_config().hidden_size
        shapes = [(*batch.input_ids.shape, hidden) for batch in batches]
        self.key = _key(streams, batches)
        self._make_room()
        self.states = {
            stream.name: HiddenStates(shapes, model.model.dtype, self._place(number), share=len(streams))
            for number, stream in enumerate(streams)
        }
        self._next_save = 0.0

    def carry_out(self, on_layer: Callable[[int, Entering], None], title: str, progress: Progress) -> None:
        """Go through all layers that are not done yet."""
        done = self._go_on()
        stopping = DeferredInterrupt(
            lambda: progress.note("Stopping after this layer; press Ctrl-C again to stop at once.")
        )
        with progress.phase(title, self.layers - done, "layer") as advance, stopping as stop:
            if done == 0:
                self._enter()
            for layer in self.model.layers(done, self.layers):
                on_layer(layer, self._at(layer))
                self._layer(layer)
                advance(1)
                if layer + 1 < self.layers:
                    self._save(layer + 1, now=stop.noted)
                    stop.check()

    def _enter(self) -> None:
        roots = [self.states[stream.name] for stream in self.streams if stream.parent is None]
        with self.model.embeddings():
            for number, batch in enumerate(self.batches):
                entering = self.model.enter(batch.input_ids, batch.attention_mask)
                for states in roots:
                    states.put(number, entering)
        for states in roots:
            states.turn(0)

    def _layer(self, layer: int) -> None:
        """Take every stream through the layer in memory, branches first: their parents' states are then still there."""
        running = [stream for stream in self.streams if stream.start <= layer]
        for stream in reversed(running):
            entering, leaving = self._entering(stream.name, layer), self.states[stream.name]
            with stream.state(self.model, layer):
                for number, batch in enumerate(self.batches):
                    leaving.put(number, stream.through(self.model, layer, batch, entering.take(number)))
        for stream in running:
            self.states[stream.name].turn(layer + 1)

    def _at(self, layer: int) -> Entering:
        return lambda name, number: self._entering(name, layer).take(number)

    def _entering(self, name: str, layer: int) -> HiddenStates:
        """The states with which a stream enters a layer: its own, or at a branch those of its parent."""
        stream = next(stream for stream in self.streams if stream.name == name)
        if layer > stream.start or stream.parent is None:
            return self.states[name]
        return self._entering(stream.parent, layer)

    def _place(self, number: int) -> Path:
        place = self.folder / f"stream-{number:03d}"
        place.mkdir(exist_ok=True)
        return place

    def _make_room(self) -> None:
        """Delete what another run has left in the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if is_begun(self.folder) and self._left()[1] == self.key:
            return
        for path in list(self.folder.iterdir()):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _left(self) -> tuple[int, str]:
        """How many layers are done, and the key of the run that did them."""
        try:
            found = json.loads((self.folder / _DONE).read_text(encoding="utf-8"))
            return int(found["layers"]), str(found["run"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged() from error

    def _go_on(self) -> int:
        """Take up what an interrupted run left; gives the number of layers that are done."""
        from safetensors import SafetensorError

        if not is_begun(self.folder):
            return 0
        done, _ = self._left()
        try:
            if self.sums is not None:
                self.sums.restore(self.folder, done)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise self._damaged() from error
        for stream in self.streams:
            if stream.parent is None or stream.start < done:
                self.states[stream.name].restore(done)
        return done

    def _save(self, done: int, *, now: bool) -> None:
        """Save what is finished, unless that would take too much of the time."""
        began = time.monotonic()
        if not now and began < self._next_save:
            return
        if self.sums is not None:
            self.sums.save(self.folder, done)
        begun = [self.states[stream.name] for stream in self.streams if stream.parent is None or stream.start < done]
        for states in begun:
            states.save()
        write_json(self.folder / _DONE, {"layers": done, "run": self.key})
        for states in begun:
            states.tidy()
        ended = time.monotonic()
        self._next_save = ended + (ended - began) / SAVE_SHARE

    def _damaged(self) -> CheckpointError:
        return CheckpointError(f"What an interrupted run left in {self.folder} is damaged; delete that folder.")


def _check(streams: Sequence[Stream]) -> None:
    known: dict[str, Stream] = {}
    for stream in streams:
        parent = known.get(stream.parent) if stream.parent is not None else None
        if stream.name in known:
            raise ValueError(f"Two streams are called {stream.name!r}.")
        if parent is None and (stream.parent is not None or stream.start != 0):
            raise ValueError(f"Stream {stream.name!r} has nothing to start from at layer {stream.start}.")
        if parent is not None and parent.start > stream.start:
            raise ValueError(f"Stream {stream.name!r} starts at layer {stream.start}, its parent at {parent.start}.")
        known[stream.name] = stream


def _key(streams: Sequence[Stream], batches: Sequence[Batch]) -> str:
    """What a run is, by its content: its streams and its tokens."""
    found = hashlib.sha256(json.dumps([[s.name, s.start, s.parent] for s in streams]).encode())
    for batch in batches:
        found.update(json.dumps([batch.input_ids.tolist(), batch.attention_mask.tolist()]).encode())
    return found.hexdigest()
