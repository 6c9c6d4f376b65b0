"""Guard rails: what a user should hear before a selection is used."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shape_moe.selection.method import Method
from shape_moe.units import readable_share

SUPER_EXPERT_RATIO = 10.0
"""An expert whose largest output norm is this many times its layer's median is an outlier (arXiv 2507.23279 finds
a handful of such "super experts", whose removal breaks a model)."""
UNSEEN_SHARE = 0.05
UNSTABLE_AGREEMENT = 0.9


def super_experts(largest_norm: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Experts with outlier output norms.

    Args:
        largest_norm: float [L, E], largest output norm of each expert, 0 where it was never routed to.

    Returns:
        bool [L, E].
    """
    flags = np.zeros(largest_norm.shape, dtype=bool)
    for row, norms in enumerate(largest_norm):
        seen = norms[norms > 0]
        if len(seen):
            flags[row] = norms > SUPER_EXPERT_RATIO * np.median(seen)
    return flags


def warn_lost_super_experts(
    layers: tuple[int, ...], largest: NDArray[np.float64], kept: NDArray[np.bool_]
) -> list[str]:
    """Warn when a super expert is dropped."""
    lost = np.argwhere(super_experts(largest) & ~kept)
    if not len(lost):
        return []
    names = ", ".join(f"layer {layers[row]} expert {expert}" for row, expert in lost[:5])
    more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
    protect = " ".join(f"--protect {layers[row]}:{expert}" for row, expert in lost[:5])
    return [
        f"The selection drops {len(lost)} experts with outlier output norms ({names}{more}); removing such experts "
        f"can break a model. Keep them with {protect}, or check the output."
    ]


def warn_unseen(tokens: NDArray[np.float64]) -> list[str]:
    """Warn when calibration left many experts without a single token."""
    unseen = int((tokens <= 0).sum())
    if unseen <= UNSEEN_SHARE * tokens.size:
        return []
    return [
        f"{unseen:,} of {tokens.size:,} experts were never routed to in calibration, so nothing is known about them; "
        "trace more samples (--samples) or longer answers (--max-new-tokens)."
    ]


def warn_unstable(stability: dict[str, float] | None) -> list[str]:
    """Warn when the halves of the data disagree."""
    if stability is None or stability["agreement"] >= UNSTABLE_AGREEMENT:
        return []
    return [
        f"The two halves of the calibration data agree on only {readable_share(stability['agreement'])} of the kept "
        "experts; trace more samples (--samples)."
    ]


def warn_inflation(method: Method, renormalises: bool | None) -> list[str]:
    """Warn when rerouting changes the scale of gate weights."""
    if method.routing != "reroute" or method.gate_scale == "trained" or renormalises is not False:
        return []
    other = "--routing drop" if method.equal_counts else "--gate-scale trained, which keeps their size"
    return [
        "This family does not renormalise gate weights over the top-k, so removing router rows makes the remaining "
        f"weights larger; compare with {other}."
    ]
