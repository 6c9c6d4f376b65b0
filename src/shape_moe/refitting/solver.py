r"""The least-squares problem of one layer, and its solution expert by expert.

Kept expert ``i`` serves ``n_i`` tokens. Its rows ``A_i`` [n_i, C] are what enters its down projection, each times the
token's gate weight and the token's scale ``sqrt(w_t) / |h_t|``; a bias of the down projection is one more column. With
``R`` [T, H] what is to be made up for, scaled alike, the changes ``X_i`` [C, H] of the transposed down projections
minimise

    |R - sum_i A_i X_i|^2 + sum_i lambda_i |X_i|^2,    lambda_i = rho * trace(A_i^T A_i) / C.

The experts of one token share its residual, so they are solved one after another, each from the residual that the
others leave (Gauss-Seidel): every step minimises the objective exactly over one expert, so it never rises, and sweep by
sweep it comes to the joint solution. All at once from one residual would overshoot.

An expert with few tokens is solved in their space: with ``S = lambda (A A^T + lambda)^-1`` [n, n] and ``Y`` the
residual without the expert, the residual becomes ``S Y``, and ``X = A^T S Y / lambda``. One with many is solved in the
space of its C inputs. Factorisations are float64, products of the dtype that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from shape_moe.errors import ShapeMoeError

if TYPE_CHECKING:
    import torch

SWEEPS = 3
"""So many times every expert is solved."""
_CHEAPER = 1 + math.sqrt(2)
"""In the space of n tokens a step costs n^2, in that of C inputs 2 n C + C^2, times H."""
_ROWS = 4096


@dataclass(frozen=True)
class ExpertRows:
    """What one kept expert sees of a calibration set.

    Attributes:
        tokens: int64 [n], rows of the problem that it serves, each once.
        gates: [n], the gate weights that it received.
        inputs: [n, I], what entered its down projection, in the model's dtype.
    """

    tokens: torch.Tensor
    gates: torch.Tensor
    inputs: torch.Tensor

    def of(self, rows: torch.Tensor) -> ExpertRows:
        """Those whose token is marked in a mask [T]."""
        mine = rows[self.tokens].nonzero()[:, 0]
        return ExpertRows(self.tokens[mine], self.gates[mine], self.inputs[mine])


@dataclass(frozen=True)
class Problem:
    """One layer's problem.

    Attributes:
        experts: the kept ones.
        target: [T, H], what the pruned model's residual stream lacks, divided by the family's factor on the block's
            output.
        scale: [T], ``sqrt(w_t) / |h_t|``; tokens with scale 0 play no part.
        held_out: bool [T], tokens that are kept out of the fit and tell whether it generalises.
        has_bias: whether the down projections have a bias.
        dtype: of products and of the residual, float32 or float64.
    """

    experts: Sequence[ExpertRows]
    target: torch.Tensor
    scale: torch.Tensor
    held_out: torch.Tensor
    has_bias: bool
    dtype: torch.dtype

    def rows(self, expert: ExpertRows) -> torch.Tensor:
        """``A_i`` [n, C]."""
        import torch

        factor = (self.scale[expert.tokens].double() * expert.gates.double()).to(self.dtype).unsqueeze(1)
        rows = expert.inputs.to(self.dtype) * factor
        return torch.cat([rows, factor], dim=1) if self.has_bias else rows


@dataclass(frozen=True)
class Fit:
    """What a solution says of itself; all figures are sums of squares in units of the scaled target.

    Attributes:
        before: ``|R|^2`` over the fitted tokens.
        after: ``|R - sum_i A_i X_i|^2`` over them.
        penalty: ``sum_i lambda_i |X_i|^2``; ``after + penalty`` is the objective, ``before`` what it was.
        held_out_before: ``|R|^2`` over the tokens that were kept out.
        held_out_after: the same with the changes as they were stored.
    """

    before: float
    after: float
    penalty: float
    held_out_before: float
    held_out_after: float

    @property
    def generalises(self) -> bool:
        """Whether the residual of the tokens that were kept out falls."""
        return self.held_out_after < self.held_out_before


Store = Callable[[int, "torch.Tensor"], "torch.Tensor"]
"""Takes an expert's place among the kept ones and its change [C, H]; gives the change as it was stored, rounded."""


def solve(problem: Problem, rho: float, store: Store, *, sweeps: int = SWEEPS) -> Fit:
    """Solve one layer's problem.

    Args:
        problem: the problem.
        rho: strength of the ridge towards the original weights, relative to the experts' own rows.
        store: takes each expert's change as soon as it is final; experts without tokens are left out.
        sweeps: so many times every expert is solved.

    Raises:
        ValueError: for a ``rho`` that is not positive, and for no sweep.
    """
    import torch

    if not (rho > 0 and math.isfinite(rho)) or sweeps < 1:
        raise ValueError("rho must be positive and finite, and there must be at least one sweep.")
    counted = problem.scale > 0
    fitted, out = counted & ~problem.held_out, counted & problem.held_out
    scaled = problem.target.to(problem.dtype) * problem.scale.to(problem.dtype).unsqueeze(1)
    residual = torch.where(fitted.unsqueeze(1), scaled, 0)
    places = out.nonzero()[:, 0]
    left_out, before_out = scaled[places], _square(scaled[places])
    place_of = torch.full_like(problem.held_out, -1, dtype=torch.int64)
    place_of[places] = torch.arange(len(places), device=places.device)
    del scaled
    before = _square(residual)
    steps = [_step(problem, expert.of(fitted), rho) for expert in problem.experts]
    penalty = 0.0
    for sweep in range(sweeps):
        for number, step in enumerate(steps):
            if step is None:
                continue
            step.improve(residual)
            if sweep < sweeps - 1:
                continue
            change = step.change(residual)
            penalty += step.ridge * _square(change)
            stored = store(number, change).to(problem.dtype)
            unseen = problem.experts[number].of(out)
            left_out.index_add_(0, place_of[unseen.tokens], problem.rows(unseen) @ stored, alpha=-1)
            steps[number] = None
    return Fit(before, _square(residual), penalty, before_out, _square(left_out))


class _Step(Protocol):
    """One expert's part of every sweep."""

    ridge: float

    def improve(self, residual: torch.Tensor) -> None:
        """Solve the expert, and bring the residual [T, H] up to date."""

    def change(self, residual: torch.Tensor) -> torch.Tensor:
        """The expert's change [C, H], right after it was solved."""


def _step(problem: Problem, expert: ExpertRows, rho: float) -> _Step | None:
    """How an expert is solved, None for one without tokens or without anything in them: its ridge would be 0."""
    if not len(expert.tokens):
        return None
    rows = problem.rows(expert)
    ridge = rho * _square(rows) / rows.shape[1]
    if ridge <= 0:
        return None
    if rows.shape[0] <= _CHEAPER * rows.shape[1]:
        return _OfTokens(problem, expert, rows, ridge)
    return _OfInputs(problem, expert, rows, ridge)


class _OfTokens:
    """In the space of the expert's tokens."""

    def __init__(self, problem: Problem, expert: ExpertRows, rows: torch.Tensor, ridge: float) -> None:
        import torch

        self.problem, self.expert, self.ridge = problem, expert, ridge
        self.left = (ridge * _inverse(rows @ rows.T, ridge)).to(problem.dtype)
        self.share = torch.zeros(len(rows), problem.target.shape[1], dtype=problem.dtype, device=rows.device)

    def improve(self, residual: torch.Tensor) -> None:
        without = residual[self.expert.tokens].add_(self.share)
        now = self.left @ without
        residual.index_copy_(0, self.expert.tokens, now)
        self.share = without.sub_(now)

    def change(self, residual: torch.Tensor) -> torch.Tensor:
        return (self.problem.rows(self.expert).T @ residual[self.expert.tokens]).div_(self.ridge)


class _OfInputs:
    """In the space of what enters the expert's down projection."""

    def __init__(self, problem: Problem, expert: ExpertRows, rows: torch.Tensor, ridge: float) -> None:
        import torch

        self.problem, self.expert, self.ridge = problem, expert, ridge
        self.inverse = _inverse(rows.T @ rows, ridge).to(problem.dtype)
        self.now = torch.zeros(rows.shape[1], problem.target.shape[1], dtype=problem.dtype, device=rows.device)

    def improve(self, residual: torch.Tensor) -> None:
        rows = self.problem.rows(self.expert)
        uphill = rows.T @ residual[self.expert.tokens]
        step = self.inverse @ uphill.sub_(self.now, alpha=self.ridge)
        self.now += step
        residual.index_add_(0, self.expert.tokens, rows @ step, alpha=-1)

    def change(self, residual: torch.Tensor) -> torch.Tensor:  # noqa: ARG002  # known already
        return self.now


def _inverse(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """``(gram + ridge)^-1`` in float64.

    Raises:
        ShapeMoeError: where rounding is larger than the ridge.
    """
    import torch

    shifted = gram.double()
    shifted.diagonal().add_(ridge)
    factor, fault = torch.linalg.cholesky_ex(shifted)
    if int(fault):
        raise ShapeMoeError("The refit's rho is too small for the precision of its sums: use a larger one.")
    return torch.cholesky_inverse(factor)


def _square(tensor: torch.Tensor) -> float:
    """The sum of squares, in float64, without a copy of the whole."""
    return sum(float(tensor[start : start + _ROWS].double().square().sum()) for start in range(0, len(tensor), _ROWS))
