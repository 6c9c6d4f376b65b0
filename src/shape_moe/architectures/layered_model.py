"""A Transformers model of which one decoder layer is in memory at a time: for models that are larger than memory.

The model is built without weights, by Transformers' own loading: its class, dtype, kernels, buffers and the family's
conversions of names and layouts are those of the whole model. Masks, positions and everything else that a decoder layer
is called with are made by the model's own forward pass, which runs around each layer with all other layers passing
their input on; so a layer does what it does in the whole model, bit for bit.

Any number of streams of hidden states may be taken through the layer that is in memory before the next one replaces it:
batches of examples, and what is to be compared with them.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.empty_model import Once, ShapeAlone, convert, load_config, without_weights
from shape_moe.architectures.host_memory import give_back_free_memory
from shape_moe.architectures.layer_reader import WeightReader
from shape_moe.architectures.loaded import check_loaded, kind_left_aside
from shape_moe.architectures.loading import DTYPES
from shape_moe.architectures.moe_config import foreign_code
from shape_moe.architectures.placement import computing_device
from shape_moe.architectures.plain_model import (
    about_quantisation,
    why_not_observable,
)
from shape_moe.architectures.quantised.plain import PlainTensor
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.errors import CheckpointError, UnsupportedModelError, UsageError, first_line

if TYPE_CHECKING:
    import torch
    from torch import nn

Note = Callable[[str], None]
_LARGE = 2**26


class LayeredModel:
    """A model that is read layer by layer.

    Args:
        snapshot: the model on disk.
        device: where a layer computes: ``auto`` (the first GPU where there is one), ``cpu``, ``cuda:1``, ...
        dtype: in which dtype, ``auto`` for the checkpoint's.
        note: where to tell the user something that is worth a line.

    Attributes:
        model: the model; weights that are not in memory are on the meta device.
        num_layers: its decoder layers.

    Raises:
        UnsupportedModelError: for code that comes with a model, and for quantised weights that have no values.
        CheckpointError: when the weights on disk are not all that the model needs.
        UsageError: for an unknown device or dtype.
    """

    def __init__(
        self, snapshot: Snapshot, *, device: str = "auto", dtype: str = "auto", note: Note = lambda _: None
    ) -> None:
        if dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
        if (reason := why_not_layered(snapshot)) is not None:
            raise UnsupportedModelError(f"{snapshot.name} cannot be read layer by layer: {reason}.")
        self.snapshot, self.device = snapshot, computing_device(device)
        _keep_no_kernels()
        self.model, info = without_weights(snapshot, dtype)
        self._reader = WeightReader(snapshot, self.model.dtype)
        left = check_loaded(snapshot, self.model, info)
        for line in (*snapshot.notes, about_quantisation(snapshot, dtype), left):
            if line is not None:
                note(line)
        self.model.eval()
        self._decoder: Any = self.model.get_decoder()
        self._layers: list[nn.Module] = list(self._decoder.layers)
        self.num_layers = len(self._layers)
        self._load_config = load_config(self.model, self.device)
        self._names = [self._names_of(layer) for layer in self._layers]
        self._entry = self._names_of(self.model.get_input_embeddings())
        behind = self._names_of(self.model) - set().union(*self._names) - self._entry
        self._exit = behind | self._names_of(self.model.get_output_embeddings())
        self._tied = _tied_names(self.model)
        self._tensors: dict[int, list[PlainTensor]] = defaultdict(list)
        for name, tensor in snapshot.plain.items():
            if kind_left_aside(snapshot, name) is None:
                self._tensors[snapshot.role(name).layer].append(tensor)
        self._outside = {tensor.name: self._targets(tensor) for tensor in self._tensors[-1]}
        self._move_buffers()
        self._empty = {name: tensor for name, tensor in _tensors(self.model) if tensor.is_meta}
        self._entering: torch.Tensor | None = None
        self._current: int | None = None
        self._is_large = False
        for index, layer in enumerate(self._layers):
            layer.forward = self._forward_of(index, layer.forward)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that were read so far."""
        return self._reader.bytes_read

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        """Have the input embeddings in memory, for :meth:`enter`."""
        with self._in_memory(self._entry):
            yield

    def enter(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """What the first decoder layer receives [B, T, H] for tokens [B, T]."""
        return self._run(input_ids=input_ids.to(self.device), attention_mask=attention_mask.to(self.device))

    def layers(self, start: int = 0, stop: int | None = None) -> Iterator[int]:
        """Have each decoder layer in memory in turn, while the next one is read.

        Args:
            start: the first.
            stop: the one behind the last, None for the model's last.

        Yields:
            The index of the layer that is in memory.
        """
        stop = self.num_layers if stop is None else stop
        with ThreadPoolExecutor(1, "weights") as pool:
            coming = pool.submit(self._read, start) if start < stop else None
            for index in range(start, stop):
                assert coming is not None
                tensors, coming = coming.result(), None
                self._is_large = sum(tensor.nbytes for tensor in tensors.values()) >= _LARGE
                self._fill(tensors)
                self._check_whole(index)
                coming = pool.submit(self._read, index + 1) if index + 1 < stop else None
                self._current = index
                try:
                    yield index
                finally:
                    self._current = None
                    self._drop(self._names[index])
                    self._tidy_up()

    def advance(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, H] after the layer that is in memory, on the device that computes.

        Args:
            hidden: what the layer receives.
            attention_mask: int64 [B, T], 1 on tokens.
        """
        assert self._current is not None
        self._entering = hidden.to(self.device)
        try:
            return self._run(inputs_embeds=self._entering, attention_mask=attention_mask.to(self.device))
        finally:
            self._entering = None
            self._tidy_up()

    @contextmanager
    def head(self) -> Iterator[None]:
        """Have the final norm and the head in memory, for :meth:`logits`."""
        with self._in_memory(self._exit):
            yield

    def logits(
        self, hidden: torch.Tensor, attention_mask: torch.Tensor, columns: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [B, T, V] of hidden states that have left the last decoder layer.

        Args:
            hidden: the states.
            attention_mask: int64 [B, T], 1 on tokens.
            columns: the positions that are wanted, None for all.
        """
        import torch

        self._entering = hidden.to(self.device)
        try:
            with torch.no_grad():
                output = self.model(
                    inputs_embeds=self._entering,
                    attention_mask=attention_mask.to(self.device),
                    logits_to_keep=0 if columns is None else columns.to(self.device),
                    use_cache=False,
                )
        finally:
            self._entering = None
        logits: torch.Tensor = output.logits
        return logits

    def _run(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The decoder's forward pass without its final norm."""
        import torch

        norm = self._decoder.get_submodule(self.snapshot.moe.family.final_norm)
        norm.forward = _unchanged
        try:
            with torch.no_grad():
                output: torch.Tensor = self._decoder(use_cache=False, **inputs).last_hidden_state
        finally:
            del norm.forward
        return output

    def _forward_of(self, index: int, real: Callable[..., Any]) -> Callable[..., Any]:
        """A decoder layer's forward that computes when the layer is in memory, and else passes its input on."""

        def forward(hidden: torch.Tensor, *arguments: Any, **more: Any) -> torch.Tensor:
            entering = self._entering
            if index != self._current:
                return entering if index == 0 and entering is not None else hidden
            output: torch.Tensor = real(entering, *arguments, **more)
            return output

        return forward

    @contextmanager
    def _in_memory(self, names: set[str]) -> Iterator[None]:
        """Have tensors outside the decoder layers in memory, by their names in the live model."""
        self._fill(self._reader.read(tensor for tensor in self._tensors[-1] if self._outside[tensor.name] & names))
        for tied in self._tied:
            real = [name for name in tied if not _get(self.model, name).is_meta]
            for name in tied:
                _set(self.model, name, _get(self.model, real[0] if real else name))
        try:
            yield
        finally:
            self._drop(names)

    def _names_of(self, module: nn.Module) -> set[str]:
        """Names in the live model of the tensors below a module, those that are tied to them among them."""
        mine = {id(tensor) for _, tensor in _tensors(module)}
        return {name for name, tensor in _tensors(self.model) if id(tensor) in mine}

    def _targets(self, tensor: PlainTensor) -> set[str]:
        """Names in the live model of what a tensor on disk becomes."""
        return set(self.model.state_dict()) - set(
            convert(self.model, {tensor.name: ShapeAlone.of(tensor)}, self._load_config).missing_keys
        )

    def _read(self, layer: int) -> dict[str, torch.Tensor]:
        return self._reader.read(self._tensors[layer])

    def _fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put tensors on disk where the live model has them, converted as Transformers' loading does."""
        once = {name: Once(tensors, name) for name in list(tensors)}
        info = convert(self.model, once, self._load_config)
        if info.conversion_errors:
            raise CheckpointError(f"{self.snapshot.name}: {first_line(next(iter(info.conversion_errors.values())))}")

    def _check_whole(self, layer: int) -> None:
        for name in self._names[layer]:
            if _get(self.model, name).is_meta:
                raise CheckpointError(f"{self.snapshot.name}: {name} is not on disk.")

    def _tidy_up(self) -> None:
        """Give free memory back, where a layer is so large that it matters: it takes a tenth of a second."""
        if self._is_large:
            give_back_free_memory()

    def _drop(self, names: Iterable[str]) -> None:
        """Let go of weights."""
        for name in names:
            if name in self._empty:
                _set(self.model, name, self._empty[name])

    def _move_buffers(self) -> None:
        for name, buffer in list(self.model.named_buffers()):
            if not buffer.is_meta:
                _set(self.model, name, buffer.to(self.device))


def why_not_layered(snapshot: Snapshot) -> str | None:
    """Why a model cannot be read layer by layer, None when it can."""
    if foreign_code(snapshot.config) is not None and snapshot.trust_remote_code:
        return "it runs code of its own, whose way of loading is not known"
    return snapshot.moe.family.not_layered or why_not_observable(snapshot)


def _keep_no_kernels() -> None:
    """Keep the CPU's kernels for matrix products from being kept: every number of tokens that an expert gets makes one.

    Hundreds of megabytes are saved so, and no time is lost. It is read when the first of them is made, and changes
    nothing after that.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers with their names, tied ones under each of theirs."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _tied_names(model: nn.Module) -> list[list[str]]:
    """Names of tensors that are one and the same."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in _tensors(model):
        names[id(tensor)].append(name)
    return [same for same in names.values() if len(same) > 1]


def _get(model: nn.Module, name: str) -> torch.Tensor:
    path, _, key = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(path), key)
    return found


def _set(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, key = name.rpartition(".")
    setattr(model.get_submodule(path), key, tensor)


def _unchanged(hidden: torch.Tensor) -> torch.Tensor:
    return hidden
