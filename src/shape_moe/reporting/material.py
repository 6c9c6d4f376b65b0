"""What a report is made of; the job gathers it, the pages show what there is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.evaluation.evaluated import Evaluation
from shape_moe.evaluation.forgotten import Forgotten
from shape_moe.evaluation.swept import Sweep
from shape_moe.evaluation.verdict import Verdict
from shape_moe.reporting.figures.co_activation import lost_shares
from shape_moe.reporting.figures.layers import kept_mass
from shape_moe.reporting.opening import Opening, short_name
from shape_moe.scoring.scores import Scores
from shape_moe.selection.agreement import scoring_of
from shape_moe.selection.layer_curves import LayerCurves
from shape_moe.selection.selection import Selection
from shape_moe.tracing.token_weights import TokenWeights
from shape_moe.tracing.trace import Trace


@dataclass(frozen=True)
class Sizes:
    """Bytes of weights before and after pruning, and where the numbers come from, in words."""

    before: float
    after: float
    origin: str


@dataclass(frozen=True)
class Material:
    """Everything that a report may show; at least one part is there.

    Attributes:
        source: what the report was asked for: a path.
        selection: what is kept.
        scores: what experts are worth.
        trace: the calibration pass.
        rivals: values by every scorer that the trace allows.
        sizes: of the weights.
        sweep: quality over keep rates.
        evaluation: quality, memory and speed.
        given_model: name of the original where the reader gave it.
        remarks: what a reader should know about how these fit together.
        checkpoint: whether the source is a pruned checkpoint.
        verdict: what the job that wrote the checkpoint says of it, None where it was not judged.
        forgotten: what became of general prompts, None where they were not asked.
        experiment: an experiment's document.
        demo: a demonstration's document.
        curves: what each layer's cut costs by itself, where the selection was made by that.
    """

    source: str
    selection: Selection | None = None
    scores: Scores | None = None
    trace: Trace | None = None
    rivals: tuple[Scores, ...] = ()
    sizes: Sizes | None = None
    sweep: Sweep | None = None
    evaluation: Evaluation | None = None
    given_model: str | None = None
    remarks: tuple[str, ...] = ()
    checkpoint: bool = False
    verdict: Verdict | None = None
    forgotten: Forgotten | None = None
    experiment: Mapping[str, Any] | None = None
    demo: Mapping[str, Any] | None = None
    curves: LayerCurves | None = None

    @cached_property
    def model(self) -> str | None:
        """Name of the model as it was given, None where nothing names it."""
        named = (
            self.given_model,
            self.selection.model if self.selection else None,
            self.trace.info.model if self.trace else None,
            self.sweep.model if self.sweep else None,
            self.evaluation.model if self.evaluation else None,
        )
        return next((name for name in named if name), None)

    @property
    def model_word(self) -> str:
        """The model as it is written in a command."""
        return shlex.quote(self.model) if self.model else "MODEL"

    @property
    def model_name(self) -> str:
        """The model's name for a heading, see :func:`~shape_moe.reporting.opening.short_name`; else the source's."""
        return short_name(self.model or f"./{self.source}")

    @property
    def pruned_name(self) -> str:
        """What the pruned model is called: the checkpoint's folder, where there is one."""
        return short_name(f"./{self.source}") if self.checkpoint else f"{self.model_name}, pruned"

    @cached_property
    def opening(self) -> Opening | None:
        """The lines that the report opens with; None where nothing was selected."""
        if self.selection is None:
            return None
        sizes = (int(self.sizes.before), int(self.sizes.after)) if self.sizes is not None else None
        samples = self.trace.info.examples if self.trace is not None else None
        return Opening.of(self.model or f"./{self.source}", self.selection, sizes, samples, self.verdict)

    @property
    def weights(self) -> TokenWeights | None:
        """How much tokens counted; None where every scorer has its own weights."""
        return scoring_of(self.selection).weights

    @cached_property
    def kept_mass(self) -> NDArray[np.float64] | None:
        """Share of each layer's value that the selection keeps, float [L]; None without a selection."""
        return kept_mass(self.selection, self.scores) if self.selection is not None else None

    @cached_property
    def lost_shares(self) -> NDArray[np.float64] | None:
        """Share of each layer's tokens that lose 0, 1, ... k of their experts, float [L, k + 1]."""
        if self.trace is None or self.selection is None:
            return None
        return lost_shares(self.trace, self.selection, self.weights)

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers with experts."""
        if self.scores is not None:
            return self.scores.layers
        return tuple(self.selection.layers) if self.selection is not None else ()
