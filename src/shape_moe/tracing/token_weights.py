"""How much a token counts when a trace is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from shape_moe.errors import UsageError

Parts = tuple[tuple[float, tuple[int, int]], ...]


class TokenWeights(Protocol):
    """How much a token counts, by its cell."""

    @property
    def parts(self) -> Parts:
        """Factors, each with the two cells (see :data:`shape_moe.calibration.batches.CELLS`) that it belongs to."""

    @property
    def flags(self) -> dict[str, float]:
        """The weights by name, as artifacts and the command line have them."""


@dataclass(frozen=True)
class SegmentWeights:
    """How much a token counts when a trace is scored, by segment."""

    prompt: float = 1.0
    response: float = 1.0

    def __post_init__(self) -> None:
        if not (self.prompt >= 0 and self.response >= 0 and self.prompt + self.response > 0):
            raise UsageError("Segment weights must not be negative, and one of them must be positive.")

    @property
    def parts(self) -> Parts:
        """Prompt and response tokens, whatever they predict."""
        return (self.prompt, (0, 1)), (self.response, (2, 3))

    @property
    def flags(self) -> dict[str, float]:
        """By the names of the attributes."""
        return asdict(self)


@dataclass(frozen=True)
class PredictingWeights:
    """How much a token counts when a trace is scored, by whether its *next* token belongs to the response.

    What matters is the token that predicts a response token: the last prompt token does, the last response token does
    not. Weighting by the token's own segment would leave out the one that decides how an answer begins.
    """

    predicting: float = 1.0
    other: float = 0.25

    def __post_init__(self) -> None:
        if not (self.predicting >= 0 and self.other >= 0 and self.predicting + self.other > 0):
            raise UsageError("Weights of tokens must not be negative, and one of them must be positive.")

    @property
    def parts(self) -> Parts:
        """Predicting tokens and all others, whatever segment they belong to."""
        return (self.predicting, (1, 3)), (self.other, (0, 2))

    @property
    def flags(self) -> dict[str, float]:
        """By the names of the attributes."""
        return asdict(self)


def token_weights(given: Mapping[str, Any]) -> SegmentWeights | PredictingWeights | None:
    """Weights from some of their names: ``prompt`` and ``response``, or ``predicting`` and ``other``.

    Args:
        given: weights by name; None stands for one that is not given, and other names are not looked at.

    Returns:
        The weights, None where none is given: each scorer's own.

    Raises:
        UsageError: for names of both kinds, and for weights that cannot be.
    """
    segments, predicting = (
        {name: float(given[name]) for name in names if given.get(name) is not None}
        for names in (("prompt", "response"), ("predicting", "other"))
    )
    if segments and predicting:
        raise UsageError(
            "Tokens are weighted by their segment (--prompt-weight, --response-weight) or by what they predict "
            "(--predicting-weight, --other-weight), not by both."
        )
    if segments:
        return SegmentWeights(**segments)
    return PredictingWeights(**predicting) if predicting else None
