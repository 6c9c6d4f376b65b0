"""Do the values mean anything? The selection beside its inversion and random ones, at the same counts per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shape_moe.errors import UsageError
from shape_moe.evaluation import measures
from shape_moe.evaluation.comparison import Comparison
from shape_moe.evaluation.measures import Measured
from shape_moe.progress import Advance
from shape_moe.scoring.scores import Scores
from shape_moe.selection.controls import inverted_selection, random_selection
from shape_moe.selection.selection import Selection

FEWEST_RANDOM = 3


@dataclass(frozen=True)
class Faithfulness:
    """What was measured at the same counts per layer.

    Attributes:
        name: the selection.
        kept: the selection itself.
        inverted: the highest-valued experts removed instead.
        random: experts removed at random, by seed.
    """

    name: str
    kept: Measured
    inverted: Measured
    random: tuple[Measured, ...]

    @property
    def faithful(self) -> bool:
        """Whether the selection is closer to the dense model than every random one, and those than its inversion."""
        kept, inverted = self.kept.quality["kl"].value, self.inverted.quality["kl"].value
        drawn = [measured.quality["kl"].value for measured in self.random]
        return kept < min(drawn) and sum(drawn) / len(drawn) < inverted

    def to_document(self) -> dict[str, Any]:
        """For JSON."""

        def entry(measured: Measured) -> dict[str, Any]:
            return {"quality": measures.document(measured.quality), "change": measures.document(measured.change)}

        return {
            "selection": self.name,
            "kept": entry(self.kept),
            "inverted": entry(self.inverted),
            "random": [entry(measured) for measured in self.random],
            "faithful": self.faithful,
        }

    @classmethod
    def from_document(cls, found: Mapping[str, Any]) -> Faithfulness:
        """What :meth:`to_document` described."""
        kept, inverted = (Measured.from_document(found[key]) for key in ("kept", "inverted"))
        return cls(str(found["selection"]), kept, inverted, tuple(map(Measured.from_document, found["random"])))


def faithfulness(
    bench: Comparison,
    selection: Selection,
    scores: Scores,
    *,
    name: str,
    draws: int = FEWEST_RANDOM,
    groups: int = 1,
    seed: int = 0,
    advance: Advance = lambda _: None,
) -> Faithfulness:
    """Judge a selection, its inversion and random selections as masks.

    Args:
        bench: the dense model and the examples; what it has judged before is not judged again.
        selection: what to check.
        scores: the values that it was made from.
        name: what to call it.
        draws: how many random selections, at least 3.
        groups: router groups whose counts the controls must keep, 1 for none.
        seed: draws the first of them; the others follow.
        advance: called with 1 for every selection judged.

    Raises:
        UsageError: for fewer than three random selections.
    """
    if draws < FEWEST_RANDOM:
        raise UsageError(f"Faithfulness needs at least {FEWEST_RANDOM} random selections, not {draws}.")
    controls = [random_selection(selection, seed + i, groups=groups) for i in range(draws)]
    found, judged = [], [selection, inverted_selection(selection, scores, groups=groups), *controls]
    bench.prepare(judged)
    for chosen in judged:
        found.append(bench.judge(chosen, freely=False))
        advance(1)
    return Faithfulness(name, found[0], found[1], tuple(found[2:]))
