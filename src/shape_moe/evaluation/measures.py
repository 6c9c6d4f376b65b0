"""Figures with intervals, as they are shown and written: quality, change to the dense model, generation health."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.evaluation.generation import Generated
from shape_moe.evaluation.held_out_set import HeldOutSet
from shape_moe.evaluation.intervals import Bootstrap, Estimate
from shape_moe.evaluation.teacher_forced import TeacherForced
from shape_moe.units import readable_share

Figures = dict[str, Estimate]
Groups = dict[str, dict[str, Figures]]
"""``quality`` and ``change`` by class of examples."""
HEALTH_LIMIT = 0.02
"""Largest accepted increase of the share of answers that loop, or that do not end, over the dense model's."""
LENGTH_LIMIT = 0.25
"""Largest accepted relative change of the mean length of answers."""


def quality(result: TeacherForced, draws: Bootstrap, answered: list[int]) -> Figures:
    """Figures of one model over a set.

    Args:
        result: its sums by example.
        draws: resamples of the set's examples.
        answered: positions of the examples with a response, for exact match.

    Returns:
        ``nll`` (nats per scored token), ``perplexity``, ``kl`` (nats per token to the dense model), ``top1`` (share of
        tokens at which both find the same one most likely) and ``exact_match`` (share of answered examples).
    """
    nll = draws.ratio(result.nll, result.tokens)
    figures = {
        "nll": nll,
        "perplexity": nll.mapped(exp),
        "kl": draws.ratio(result.kl, result.tokens),
        "top1": draws.ratio(result.agree, result.tokens),
    }
    if answered:
        figures["exact_match"] = draws.of(len(answered)).share(result.exact[answered])
    return figures


def change(result: TeacherForced, dense: TeacherForced, draws: Bootstrap, answered: list[int]) -> Figures:
    """Paired differences of a model to the dense one: ``nll``, ``perplexity`` as a ratio, ``exact_match``."""
    nll = draws.ratio(result.nll - dense.nll, dense.tokens)
    figures = {"nll": nll, "perplexity": nll.mapped(exp)}
    if answered:
        pairs = draws.of(len(answered))
        figures["exact_match"] = pairs.share_difference(result.exact[answered], dense.exact[answered])
    return figures


@dataclass(frozen=True)
class Health:
    """Whether free-running answers are like the dense model's.

    Attributes:
        figures: ``loop_rate``, ``no_end_rate``, ``length`` (mean tokens) and ``exact_match`` with intervals.
        change: ``exact_match`` as a paired difference to the dense model.
        limit: the most tokens that an answer could have.
        complaints: what is wrong, empty for a healthy model.
    """

    figures: Figures
    change: Figures
    limit: int
    complaints: tuple[str, ...] = ()

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **document(self.figures),
            "change": document(self.change),
            "limit": self.limit,
            "complaints": list(self.complaints),
        }

    @classmethod
    def from_document(cls, found: Mapping[str, Any]) -> Health:
        """What :meth:`to_document` described."""
        complaints = tuple(str(complaint) for complaint in found.get("complaints") or ())
        return cls(figures_of(found), figures_of(found.get("change")), int(found.get("limit") or 0), complaints)


@dataclass(frozen=True)
class Measured:
    """What was measured of one model over one set.

    Attributes:
        quality: see :func:`quality`.
        change: paired differences to the dense model, empty for the dense model itself.
        health: free-running answers, None where none were made.
    """

    quality: Figures
    change: Figures = field(default_factory=dict)
    health: Health | None = None

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "quality": document(self.quality),
            "change": document(self.change) or None,
            "generation": self.health.to_document() if self.health else None,
        }

    @classmethod
    def from_document(cls, found: Mapping[str, Any]) -> Measured:
        """What :meth:`to_document` described."""
        answers = found.get("generation")
        return cls(
            figures_of(found["quality"]),
            figures_of(found.get("change")),
            Health.from_document(answers) if answers else None,
        )


def health(made: Generated, dense: Generated | None, draws: Bootstrap) -> Health:
    """Judge free-running answers beside the dense model's to the same prompts.

    Args:
        made: the answers.
        dense: the dense model's, None to judge its own.
        draws: resamples of the set that the prompts are from.
    """
    draws = draws.of(len(made.positions))
    figures = {
        "loop_rate": draws.share(made.looped),
        "no_end_rate": draws.share(~made.ended),
        "length": draws.ratio(made.lengths, np.ones(len(made.answers))),
        "exact_match": draws.share(made.exact),
    }
    if dense is None:
        return Health(figures, {}, made.limit)
    complaints = []
    for what, ours, theirs in (("loop", made.looped, dense.looped), ("do not end", ~made.ended, ~dense.ended)):
        if ours.mean() > theirs.mean() + HEALTH_LIMIT:
            after, before = (readable_share(float(found.mean())) for found in (ours, theirs))
            complaints.append(f"{after} of the answers {what} (dense model: {before})")
    usual, length = float(dense.lengths.mean()), float(made.lengths.mean())
    if abs(length - usual) > LENGTH_LIMIT * max(usual, 1.0):
        complaints.append(f"answers have {length:.1f} tokens on average (dense model: {usual:.1f})")
    return Health(
        figures, {"exact_match": draws.share_difference(made.exact, dense.exact)}, made.limit, tuple(complaints)
    )


def by_group(held_out: HeldOutSet, result: TeacherForced, dense: TeacherForced, draws: Bootstrap) -> Groups:
    """Quality and change of every class of examples.

    Args:
        held_out: the examples; one without a class is in none.
        result: a model's sums by example.
        dense: the dense model's.
        draws: resamples of the whole set.
    """
    answered = set(held_out.answered())
    found: Groups = {}
    for group in sorted({str(group) for group in held_out.groups if group is not None}):
        rows = [i for i, name in enumerate(held_out.groups) if name == group and result.tokens[i] > 0]
        if not rows:
            continue
        local = [k for k, i in enumerate(rows) if i in answered]
        drawn, ours, theirs = draws.of(len(rows)), _rows(result, rows), _rows(dense, rows)
        found[group] = {"quality": quality(ours, drawn, local), "change": change(ours, theirs, drawn, local)}
    return found


def worst_group(groups: Groups) -> tuple[str, str] | None:
    """The class that lost most, and the figure that says so: ``exact_match`` where all have it, else ``nll``."""
    if not groups:
        return None
    if all("exact_match" in group["change"] for group in groups.values()):
        return min(groups, key=lambda name: (groups[name]["change"]["exact_match"].value, name)), "exact_match"
    return max(groups, key=lambda name: (groups[name]["change"]["nll"].value, name)), "nll"


def _rows(result: TeacherForced, rows: list[int]) -> TeacherForced:
    index: NDArray[np.int64] = np.array(rows, dtype=np.int64)
    return TeacherForced(
        result.tokens[index], result.nll[index], result.kl[index], result.agree[index], result.exact[index]
    )


def document(figures: Mapping[str, Estimate]) -> dict[str, Any]:
    """Figures for JSON."""
    return {name: estimate.to_document() for name, estimate in figures.items()}


def figures_of(found: Mapping[str, Any] | None) -> Figures:
    """The figures that :func:`document` described; what is no estimate (a limit, a note) is left out."""
    return {
        str(name): Estimate.from_document(value)
        for name, value in (found or {}).items()
        if isinstance(value, dict) and value.get("value") is not None
    }
