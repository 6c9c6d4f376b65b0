"""Samples of examples that are spread over their classes."""

from __future__ import annotations

from collections.abc import Sequence


def spread_over_classes(groups: Sequence[str | None], positions: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of the positions: in turn of every class, evenly over each.

    Args:
        groups: the class of every example.
        positions: the examples to draw from.
        count: how many to take.
    """
    decks: dict[str, list[int]] = {}
    for position in positions:
        decks.setdefault(groups[position] or "", []).append(position)
    shares = _shares([len(deck) for deck in decks.values()], count)
    chosen: list[int] = []
    for deck, share in zip(decks.values(), shares, strict=True):
        chosen += [deck[i * len(deck) // share] for i in range(share)]
    return sorted(chosen)


def _shares(sizes: list[int], count: int) -> list[int]:
    """How many of each: as equal as the sizes allow."""
    shares = [0] * len(sizes)
    for _ in range(min(count, sum(sizes))):
        smallest = min((i for i, size in enumerate(sizes) if shares[i] < size), key=lambda i: shares[i])
        shares[smallest] += 1
    return shares
