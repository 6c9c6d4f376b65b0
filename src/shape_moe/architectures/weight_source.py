"""Where a model's weights come from: one interface, through which they are inspected, identified, pruned and compared.

A safetensors folder (:class:`shape_moe.architectures.snapshot.Snapshot`), quantised or not, is one implementation. What
is copied is always raw: byte ranges of files, in whatever dtype they are stored. What is computed with are the tensors
of the *plain* model, which a quantised one stands for (:mod:`shape_moe.architectures.quantised`); a source says whether
it can give them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from shape_moe.architectures.moe_config import MoeConfig
from shape_moe.architectures.quantised.method import Quantisation
from shape_moe.architectures.quantised.plain import PlainTensor
from shape_moe.architectures.safetensors_file import TensorSlot
from shape_moe.architectures.tensor_names import TensorRole

if TYPE_CHECKING:
    import torch

Form = Literal["raw", "dequantised"]
"""How values are given: as they are stored, or as the numbers that they stand for."""


class WeightSource(Protocol):
    """A model's weights, by name, layer and expert."""

    @property
    def name(self) -> str:
        """What the user calls the model."""

    @property
    def revision(self) -> str | None:
        """The commit of a hub model."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's configuration, as ``config.json`` would say it."""

    @property
    def moe(self) -> MoeConfig:
        """Facts about the routed experts."""

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Decoder layers with routed experts, ascending."""

    @property
    def tensors(self) -> Mapping[str, TensorSlot]:
        """Name, dtype, shape and byte range of every tensor."""

    @property
    def hashes(self) -> dict[str, str]:
        """Fingerprints that were computed once."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""

    @property
    def quantisation(self) -> Quantisation | None:
        """How the weights are quantised, None where they are not."""

    @property
    def forms(self) -> frozenset[Form]:
        """The forms in which the source gives values; it has :attr:`plain` tensors where it gives them dequantised."""

    @property
    def plain(self) -> Mapping[str, PlainTensor]:
        """The tensors of the plain model by the names that Transformers reads; nothing is read to list them.

        Raises:
            UnsupportedModelError: by the method's name, for weights that cannot be dequantised.
        """

    def role(self, name: str) -> TensorRole:
        """What a tensor is to the pruner."""

    def files(self) -> Iterator[tuple[Path, list[TensorSlot]]]:
        """The files in order, each with its tensors by offset."""

    def read(self, name: str) -> bytes:
        """The raw bytes of one tensor."""

    def layer(self, layer: int) -> tuple[TensorSlot, ...]:
        """All tensors of one decoder layer."""

    def expert(self, layer: int, expert: int) -> tuple[TensorSlot, ...]:
        """The tensors of one expert: its own, and its rows of those that hold all experts of the layer."""

    def values(self, slot: TensorSlot, form: Form = "raw") -> torch.Tensor:
        """The values of a stored tensor, or of a row of one.

        Raises:
            UnsupportedModelError: for a form that this source does not give, and for dequantised values of what is
                only a part of a tensor of the plain model.
        """

    @property
    def plain_or_stored(self) -> list[PlainTensor]:
        """The tensors of the plain model, to count them; the stored ones where those cannot be told."""

    def plain_layer(self, layer: int) -> tuple[PlainTensor, ...]:
        """All tensors of one decoder layer of the plain model."""

    def plain_expert(self, layer: int, expert: int) -> tuple[PlainTensor, ...]:
        """The tensors of one expert of the plain model: its own, and its rows of those that hold all of the layer."""
