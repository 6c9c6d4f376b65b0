"""Inspect a model: its experts, its size at every keep rate, and what fits a device."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

from shape_moe.architectures.sizes import PRECISION_BITS, USABLE_SHARE, ModelSize, kv_cache_bytes, measure
from shape_moe.architectures.snapshot import Snapshot, open_headers
from shape_moe.errors import UsageError
from shape_moe.selection.rules import budget_for

KEEP_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.25)


@dataclass(frozen=True)
class Fit:
    """What fits a device at one precision.

    Attributes:
        precision: of the decoder layers' matrices.
        dense_bytes: weights of the unpruned model.
        dense_fits: whether it fits unpruned.
        keep: largest keep rate whose weights fit, None when not even one expert per layer does.
        weights_bytes: weights at that keep rate.
    """

    precision: str
    dense_bytes: float
    dense_fits: bool
    keep: float | None
    weights_bytes: float | None


@dataclass(frozen=True)
class Inspection:
    """What ``shape-moe inspect`` shows."""

    snapshot: Snapshot
    size: ModelSize
    sizes: dict[float, float]
    fits: tuple[Fit, ...] = ()
    device_bytes: int | None = None
    kv_bytes: int | None = None

    @property
    def fits_somehow(self) -> bool:
        """Whether at least one precision and keep rate fits the device that was asked about, if one was."""
        return not self.fits or any(fit.dense_fits or fit.keep is not None for fit in self.fits)


def inspect_model(
    model: str | PathLike[str],
    *,
    revision: str | None = None,
    fit: int | None = None,
    context: int = 4096,
    concurrency: int = 1,
    keep_rates: tuple[float, ...] = KEEP_RATES,
) -> Inspection:
    """Look at a model's configuration and tensor headers.

    Args:
        model: a folder or hub id.
        revision: branch, tag or commit of a hub model.
        fit: bytes of a device; asks at which precision and keep rate the model fits it.
        context: tokens per sequence in the KV cache.
        concurrency: sequences in the KV cache.
        keep_rates: rates to give sizes for.

    Raises:
        CheckpointError: when the model is missing or damaged.
        UnsupportedModelError: when it has no experts that could be removed.
    """
    snapshot = open_headers(model, revision)
    size = measure(snapshot)
    sizes = {rate: size.at_keep(budget_for(rate, size.num_experts)) for rate in keep_rates}
    if fit is None:
        return Inspection(snapshot, size, sizes)
    kv_bytes = kv_cache_bytes(snapshot.config, context, concurrency)
    fits = tuple(
        _fit(size, precision, fit * USABLE_SHARE - kv_bytes, len(snapshot.moe_layers)) for precision in PRECISION_BITS
    )
    return Inspection(snapshot, size, sizes, fits, fit, kv_bytes)


def keep_that_fits(snapshot: Snapshot, fit: int, context: int, concurrency: int) -> float:
    """The largest keep rate whose weights, as stored, and KV cache fit a device.

    Raises:
        UsageError: when none does, with what would help.
    """
    size = measure(snapshot)
    kv_bytes = kv_cache_bytes(snapshot.config, context, concurrency)
    found = _fit(size, "as stored", fit * USABLE_SHARE - kv_bytes, len(snapshot.moe_layers))
    if found.keep is None:
        raise UsageError(
            f"No keep rate fits {fit / 2**30:.1f} GiB with {kv_bytes / 2**30:.1f} GiB of KV cache: what is not routed "
            f"experts takes {size.at_keep(0) / 2**30:.1f} GiB. Lower --context or --concurrency, or quantise first."
        )
    return found.keep


def _fit(size: ModelSize, precision: str, budget: float, layers: int) -> Fit:
    dense = size.at_keep(size.num_experts, precision)
    kept = size.most_kept(budget, precision)
    if kept < layers:
        return Fit(precision, dense, dense <= budget, None, None)
    # rounded down to a rate whose budget (rounded to the nearest expert) is no larger than what fits
    keep = kept / size.num_experts
    return Fit(precision, dense, dense <= budget, keep, size.at_keep(kept, precision))
