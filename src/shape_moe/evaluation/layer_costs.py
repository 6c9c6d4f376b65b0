"""What each layer's cut costs by itself: KL divergence from the dense model, in passes that start at the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from shape_moe.architectures.loading import input_device
from shape_moe.architectures.sites import decoder_layers
from shape_moe.errors import ShapeMoeError
from shape_moe.journal import Journal
from shape_moe.progress import Advance
from shape_moe.pruning.masks import masked
from shape_moe.tracing.statistics import HALVES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shape_moe.calibration.batches import Batch
    from shape_moe.selection.selection import Selection

_ROWS = 256
"""Distributions over the vocabulary are compared for so many tokens at a time."""


@torch.no_grad()
def layer_costs(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    cuts: Mapping[int, Sequence[Selection]],
    class_of: Callable[[str | None], int],
    classes: int,
    advance: Advance,
    done: Journal[list[Any]] | None = None,
    digest: str = "",
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """KL divergence from the dense model at the tokens that predict a response, summed.

    The dense pass keeps what every decoder layer gives; a pass with a cut takes that as it is up to the layer that is
    cut, and runs the rest.

    Args:
        model: the dense model.
        batches: what it runs over.
        cuts: by layer, selections that cut this layer alone.
        class_of: number of an example's class.
        classes: how many there are.
        advance: called with 1 after each pass.
        done: what an earlier run has measured, by batch and layer; what is measured now is added. The sums are those
            of an undisturbed run to the last bit.
        digest: tells this measurement from others in ``done``.

    Returns:
        Sums in nats, float64 [L, N, C, 2] (layer, selection, class, half of the examples), and tokens [C, 2].

    Raises:
        ShapeMoeError: when the dense model's logits are not finite.
    """
    known: Journal[list[Any]] = Journal(None, "part", "sums") if done is None else done
    most = max(len(found) for found in cuts.values())
    sums, tokens = np.zeros((len(cuts), most, classes, 2)), np.zeros((classes, 2))
    for number, batch in enumerate(batches):
        at = _Places.of(batch, class_of)
        if at is None:
            advance(sum(map(len, cuts.values())))
            continue
        np.add.at(tokens, at.cells, 1)
        missing = {layer: cut for layer, cut in cuts.items() if (digest, str(number), str(layer)) not in known}
        advance(sum(len(cut) for layer, cut in cuts.items() if layer not in missing))
        if missing:
            for layer, part in _costs_of(model, batch, at, missing, (most, classes, 2), advance):
                known.put((digest, str(number), str(layer)), part.tolist())
        for row, layer in enumerate(cuts):
            sums[row] += np.asarray(known[digest, str(number), str(layer)])
    return sums, tokens


@dataclass(frozen=True)
class _Places:
    """Where a batch predicts a response: the tokens [B, T], and the class and half of each of them."""

    predicting: torch.Tensor
    cells: tuple[NDArray[np.int64], NDArray[np.int64]]

    @classmethod
    def of(cls, batch: Batch, class_of: Callable[[str | None], int]) -> _Places | None:
        cells = batch.cells.view(batch.input_ids.shape)
        predicting = (cells == 1) | (cells == 3)
        if not bool(predicting.any()):
            return None
        length = batch.input_ids.shape[1]
        rows = predicting.flatten().nonzero()[:, 0]
        place = np.array([class_of(batch.examples[int(row) // length].group) for row in rows])
        return cls(predicting, (place, batch.folds[rows].numpy().astype(np.int64) % HALVES))


def _costs_of(
    model: PreTrainedModel,
    batch: Batch,
    at: _Places,
    cuts: Mapping[int, Sequence[Selection]],
    shape: tuple[int, int, int],
    advance: Advance,
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """The sums of one batch [N, C, 2], layer by layer."""
    layers = decoder_layers(model)
    with _kept_outputs(layers) as outputs:
        dense = _log_probabilities(model, batch, at.predicting)
    if not bool(torch.isfinite(dense).all()):
        raise ShapeMoeError(f"The dense model's logits are not finite at {batch.examples[0].where}.")
    for layer, selections in cuts.items():
        part = np.zeros(shape)
        with _starting_at(layer, layers, outputs):
            for number, selection in enumerate(selections):
                with masked(model, selection):
                    pruned = _log_probabilities(model, batch, at.predicting)
                np.add.at(part[number], at.cells, _divergence(dense, pruned))
                advance(1)
        yield layer, part


@torch.no_grad()
def seconds_of_a_pass(model: PreTrainedModel, batch: Batch, cut: Selection, clock: Callable[[], float]) -> float:
    """How long one pass of a batch through a masked model takes, all layers and the comparison included."""
    at = _Places.of(batch, lambda _: 0)
    chosen = batch.attention_mask.bool() if at is None else at.predicting
    dense = _log_probabilities(model, batch, chosen)
    began = clock()
    with masked(model, cut):
        _divergence(dense, _log_probabilities(model, batch, chosen))
    return clock() - began


def _log_probabilities(model: PreTrainedModel, batch: Batch, chosen: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the next token at the chosen places [P, V], float32 or wider."""
    device, columns = input_device(model), chosen.any(0).nonzero()[:, 0]
    logits: torch.Tensor = model(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        use_cache=False,
        logits_to_keep=columns.to(device),
    ).logits
    found = logits[chosen[:, columns].to(logits.device)]
    return found.to(torch.promote_types(found.dtype, torch.float32)).log_softmax(-1)


def _divergence(dense: torch.Tensor, pruned: torch.Tensor) -> NDArray[np.float64]:
    """``KL(dense || pruned)`` of every row in nats, float64 [P]."""
    parts = []
    for start in range(0, len(dense), _ROWS):
        p, q = (t[start : start + _ROWS].double() for t in (dense, pruned.to(dense.device)))
        parts.append((p.exp() * (p - q)).sum(-1))
    return np.asarray(torch.cat(parts).cpu().numpy())


@contextmanager
def _kept_outputs(layers: Mapping[int, torch.nn.Module]) -> Iterator[dict[int, Any]]:
    """What every decoder layer gives meanwhile."""
    outputs: dict[int, Any] = {}
    with ExitStack() as stack:
        for number, layer in layers.items():

            def keep(_module: torch.nn.Module, _args: Any, output: Any, number: int = number) -> None:
                outputs[number] = output

            stack.callback(layer.register_forward_hook(keep).remove)
        yield outputs


@contextmanager
def _starting_at(start: int, layers: Mapping[int, torch.nn.Module], outputs: Mapping[int, Any]) -> Iterator[None]:
    """Layers before the first that matters give what they gave, without running."""
    with ExitStack() as stack:
        for number, layer in layers.items():
            if number < start:
                stack.callback(_put_back, layer, layer.__dict__.get("forward"))
                layer.forward = lambda *_args, _given=outputs[number], **_kwargs: _given
        yield


def _put_back(layer: torch.nn.Module, forward: Any) -> None:
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward
