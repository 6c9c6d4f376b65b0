"""What a refit gives: new down projections, and what every layer says of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shape_moe.documents import as_shape
from shape_moe.errors import CheckpointError
from shape_moe.json_file import read_json
from shape_moe.pruning.down_projections import DownProjections, RefittedSelection, Weights
from shape_moe.selection.selection import Selection
from shape_moe.units import counted
from shape_moe.workspace import write_json

if TYPE_CHECKING:
    import torch

RHO = 0.3
"""Strength of the ridge towards the original weights where nothing else is said."""
_JOB = "refit.json"
ENOUGH = 1.0
"""With fewer tokens for every unknown of an output than this, a refit can fit what does not generalise."""


@dataclass(frozen=True)
class LayerRefit:
    """One layer's refit; residuals are weighted sums of squares relative to the dense stream that feeds the block.

    Attributes:
        layer: decoder-layer index.
        rho: strength of the ridge that was taken, None where the layer was left as it is.
        tokens: tokens that were fitted.
        unknowns: unknowns of every output: kept experts times what enters a down projection.
        before: residual of the fitted tokens.
        after: the same with the refitted weights as they are stored.
        held_out_before: residual of the tokens that were kept out.
        held_out_after: the same with the refitted weights as they are stored.
    """

    layer: int
    rho: float | None
    tokens: int
    unknowns: int
    before: float
    after: float
    held_out_before: float
    held_out_after: float


@dataclass(frozen=True)
class Refitted:
    """A selection's refit.

    Attributes:
        rho: strength of the ridge that was asked for.
        weights: down projections by layer; layers that were left as they are have none.
        layers: what each layer says, in order.
    """

    rho: float
    weights: Weights
    layers: tuple[LayerRefit, ...]
    _digests: list[str] = field(default_factory=list, repr=False, compare=False)

    @property
    def digest(self) -> str:
        """sha256 over all values, computed once."""
        if not self._digests:
            self._digests.append(self._digest())
        return self._digests[0]

    def _digest(self) -> str:
        whole = hashlib.sha256()
        for layer, found in sorted(self.weights.items()):
            for name, tensor in found.named().items():
                whole.update(f"{layer} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                whole.update(raw_bytes(tensor))
        return whole.hexdigest()

    @property
    def tokens_per_unknown(self) -> float:
        """Fitted tokens for every unknown of an output, in the layer that has fewest."""
        return min((found.tokens / found.unknowns for found in self.layers), default=0.0)

    def applied_to(self, selection: Selection) -> RefittedSelection:
        """The selection that it was made for, with its weights."""
        return RefittedSelection.of(selection, self.weights, self.to_document())

    def to_document(self) -> dict[str, Any]:
        """For JSON, without the values."""
        return {"rho": self.rho, "digest": self.digest, "layers": [asdict(found) for found in self.layers]}

    def lines(self) -> list[str]:
        """What people should know of it."""
        done = [found for found in self.layers if found.rho is not None]
        lines = [
            f"Refitted with rho {self.rho:g}: the down projections of {len(done)} of "
            f"{counted(len(self.layers), 'layer')}; {self.tokens_per_unknown:.2g} tokens for every unknown."
        ]
        stronger = sum(found.rho is not None and found.rho > self.rho for found in self.layers)
        if stronger:
            lines.append(
                f"{counted(stronger, 'layer')} took a larger rho, because less held back did worse on unseen tokens."
            )
        if self.tokens_per_unknown < ENOUGH and self.layers:
            fewest = min(self.layers, key=lambda found: found.tokens / found.unknowns)
            lines.append(
                f"Calibrate with more examples for a better refit: {fewest.tokens:,} tokens stand against "
                f"{fewest.unknowns:,} unknowns in layer {fewest.layer} (--samples, --max-tokens)."
            )
        return lines


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes as files hold them."""
    import torch

    return tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data


class LayerFiles:
    """Finished layers of a refit: in memory, or on disk, so that they take none and an interrupted refit goes on.

    Args:
        folder: where they lie, None for memory.
        model: tells the model from others.
    """

    def __init__(self, folder: Path | None = None, model: str = "") -> None:
        self._folder, self._model = folder, model
        self._held: dict[int, DownProjections] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def claim(self, refit: str) -> None:
        """Take the folder for a refit.

        Args:
            refit: tells it from others of the same model.

        Raises:
            CheckpointError: when it holds layers of another refit.
        """
        if self._folder is None:
            return
        file, job = self._folder / _JOB, {"model": self._model, "refit": refit}
        if any(self._folder.glob("layer-*.json")) and not (file.is_file() and read_json(file) == job):
            raise CheckpointError(
                f"{self._folder} holds layers of another refit (of another model or selection, by other examples or "
                "weights of tokens, or with another rho): give another folder, or delete this one."
            )
        write_json(file, job)

    def find(self, layer: int) -> tuple[LayerRefit, DownProjections | None] | None:
        """A layer that an interrupted refit has finished, None where there is none.

        Raises:
            CheckpointError: when its files are damaged.
        """
        if self._folder is None or not self._said(layer).is_file():
            return None
        said = as_shape(read_json(self._said(layer)), LayerRefit, self._said(layer), "a refitted layer")
        return said, (self._read(layer) if said.rho is not None else None)

    def put(self, said: LayerRefit, found: DownProjections | None) -> None:
        """Keep a finished layer."""
        from safetensors.torch import save_file

        if self._folder is None:
            if found is not None:
                self._held[said.layer] = found
            return
        if found is not None:
            save_file({name: tensor.cpu() for name, tensor in found.named().items()}, self._values(said.layer))
        write_json(self._said(said.layer), asdict(said))

    def weights(self, layers: Sequence[LayerRefit]) -> Weights:
        """The weights of finished layers; those on disk are read whenever they are asked for."""
        return self._held if self._folder is None else _Stored([x.layer for x in layers if x.rho], self._read)

    def _read(self, layer: int) -> DownProjections:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            values = load_file(self._values(layer))
            return DownProjections(values["down_proj"], values.get("down_proj_bias"))
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(
                f"{self._values(layer)} is damaged; delete its folder, and the refit begins anew."
            ) from error

    def _said(self, layer: int) -> Path:
        assert self._folder is not None
        return self._folder / f"layer-{layer:03d}.json"

    def _values(self, layer: int) -> Path:
        assert self._folder is not None
        return self._folder / f"layer-{layer:03d}.safetensors"


class _Stored(Mapping[int, DownProjections]):
    """Weights that lie on disk."""

    def __init__(self, layers: Iterable[int], read: Callable[[int], DownProjections]) -> None:
        self._layers, self._values = tuple(layers), read

    def __getitem__(self, layer: int) -> DownProjections:
        if layer not in self._layers:
            raise KeyError(layer)
        return self._values(layer)

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)
