"""The solver against the dense normal equations of the whole layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shape_moe.refitting.solver import ExpertRows, Fit, Problem, solve

HIDDEN = 5


def make_problem(
    seed: int, *, tokens: int = 40, experts: int = 4, width: int = 6, top_k: int = 2, has_bias: bool = False
) -> Problem:
    """A random layer: every token is served by some of the experts, every tenth one is kept out."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    serves = torch.stack([torch.randperm(experts, generator=draw)[:top_k] for _ in range(tokens)])
    rows = []
    for expert in range(experts):
        mine = (serves == expert).any(1).nonzero()[:, 0]
        rows.append(ExpertRows(mine, normal(len(mine)).abs(), normal(len(mine), width)))
    held_out = torch.arange(tokens) % 10 == 9
    return Problem(rows, normal(tokens, HIDDEN), normal(tokens).abs(), held_out, has_bias, torch.float64)


def solved(problem: Problem, rho: float, sweeps: int = 3) -> tuple[dict[int, torch.Tensor], Fit]:
    """The changes by expert, stored as they are, and the fit."""
    found: dict[int, torch.Tensor] = {}

    def store(number: int, change: torch.Tensor) -> torch.Tensor:
        found[number] = change.clone()
        return change

    return found, solve(problem, rho, store, sweeps=sweeps)


def naive_rows(problem: Problem, *, held_out: bool) -> list[np.ndarray]:
    """Every expert's columns of the joint design matrix [T, C], zero at tokens that it does not serve."""
    found = []
    for expert in problem.experts:
        width = expert.inputs.shape[1] + problem.has_bias
        design = np.zeros((len(problem.scale), width))
        for token, gate, entering in zip(expert.tokens, expert.gates, expert.inputs, strict=True):
            if bool(problem.held_out[token]) == held_out:
                row = [*entering.tolist(), *([1.0] if problem.has_bias else [])]
                design[int(token)] = float(problem.scale[token]) * float(gate) * np.array(row)
        found.append(design)
    return found


def naive_target(problem: Problem, *, held_out: bool) -> np.ndarray:
    scaled = (problem.target * problem.scale.unsqueeze(1)).numpy()
    return scaled * (problem.held_out.numpy() == held_out)[:, None]


def ridges(designs: list[np.ndarray], rho: float) -> list[float]:
    return [rho * float(np.trace(design.T @ design)) / design.shape[1] for design in designs]


def joint_solution(problem: Problem, rho: float) -> list[np.ndarray]:
    """All experts at once from the normal equations."""
    designs = naive_rows(problem, held_out=False)
    whole = np.concatenate(designs, axis=1)
    widths = [design.shape[1] for design in designs]
    ridge = np.concatenate([np.full(w, lam) for w, lam in zip(widths, ridges(designs, rho), strict=True)])
    solution = np.linalg.solve(whole.T @ whole + np.diag(ridge), whole.T @ naive_target(problem, held_out=False))
    return np.split(solution, np.cumsum(widths)[:-1])


def objective(problem: Problem, changes: dict[int, torch.Tensor], rho: float) -> tuple[float, float]:
    """What is minimised, by its definition: the residual's square and the penalty."""
    designs = naive_rows(problem, held_out=False)
    left = naive_target(problem, held_out=False)
    left = left - sum(designs[i] @ change.numpy() for i, change in changes.items())
    lambdas = ridges(designs, rho)
    return float((left**2).sum()), sum(lambdas[i] * float((c.numpy() ** 2).sum()) for i, c in changes.items())


SHAPES = {"few tokens": {"tokens": 14, "width": 9}, "many tokens": {"tokens": 150, "width": 3}}


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rho", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_sweeps_come_to_the_solution_of_the_normal_equations(shape: str, rho: float, has_bias: bool) -> None:
    problem = make_problem(1, has_bias=has_bias, **SHAPES[shape])
    changes, _ = solved(problem, rho, sweeps=400)
    expected = joint_solution(problem, rho)
    assert set(changes) == set(range(len(expected)))
    for number, change in changes.items():
        np.testing.assert_allclose(change.numpy(), expected[number], rtol=1e-8, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 60),
    width=st.integers(1, 12),
    rho=st.sampled_from([0.03, 0.3, 3.0, 300.0]),
    has_bias=st.booleans(),
)
def test_the_objective_is_what_it_says_and_never_rises(
    seed: int, tokens: int, width: int, rho: float, has_bias: bool
) -> None:
    problem = make_problem(seed, tokens=tokens, width=width, has_bias=has_bias)
    last = float((naive_target(problem, held_out=False) ** 2).sum())
    for sweeps in (1, 2, 3):
        changes, fit = solved(problem, rho, sweeps)
        after, penalty = objective(problem, changes, rho)
        assert fit.before == pytest.approx(float((naive_target(problem, held_out=False) ** 2).sum()), rel=1e-12)
        assert fit.after == pytest.approx(after, rel=1e-9, abs=1e-12 * fit.before)
        assert fit.penalty == pytest.approx(penalty, rel=1e-9)
        assert fit.after + fit.penalty <= last * (1 + 1e-12)
        last = fit.after + fit.penalty


def test_the_first_step_gives_exactly_the_gain_of_one_expert() -> None:
    """With one expert a single sweep is the whole solution: the objective falls by ``<A^T R, X>``."""
    problem = make_problem(3, experts=1, top_k=1)
    changes, fit = solved(problem, 0.3, sweeps=1)
    (design,) = naive_rows(problem, held_out=False)
    gain = float((design.T @ naive_target(problem, held_out=False) * changes[0].numpy()).sum())
    assert fit.before - (fit.after + fit.penalty) == pytest.approx(gain, rel=1e-10)
    assert gain > 0.1 * fit.before


def test_tokens_that_are_kept_out_play_no_part_and_are_judged_by_what_was_stored() -> None:
    problem = make_problem(4)
    changes, fit = solved(problem, 3.0)
    shifted = replace(problem, target=problem.target + problem.held_out.unsqueeze(1) * 7.0)
    others, _ = solved(shifted, 3.0)
    for number, change in changes.items():
        assert torch.equal(change, others[number])
    halved = solve(problem, 3.0, lambda _, change: change / 2)
    for share, said in ((1.0, fit), (0.5, halved)):
        left = naive_target(problem, held_out=True)
        for number, design in enumerate(naive_rows(problem, held_out=True)):
            left = left - share * design @ changes[number].numpy()
        assert said.held_out_after == pytest.approx(float((left**2).sum()), rel=1e-10)
    assert fit.held_out_before == pytest.approx(float((naive_target(problem, held_out=True) ** 2).sum()), rel=1e-12)


def test_a_fit_generalises_when_the_residual_of_unseen_tokens_falls() -> None:
    """A target that the experts could give is found again; noise is not."""
    noise = make_problem(5, tokens=400, width=4)
    true = [torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(4)]
    target = torch.zeros_like(noise.target)
    for expert, change in zip(noise.experts, true, strict=True):
        target.index_add_(0, expert.tokens, expert.gates.unsqueeze(1) * expert.inputs @ change)
    assert solved(replace(noise, target=target), 0.03)[1].generalises
    few = make_problem(6, tokens=40, width=30)
    assert not solved(few, 0.03)[1].generalises


def test_no_residual_leaves_every_weight_as_it_is() -> None:
    problem = make_problem(7)
    changes, fit = solved(replace(problem, target=torch.zeros_like(problem.target)), 0.3)
    assert all(bool((change == 0).all()) for change in changes.values())
    assert (fit.before, fit.after, fit.penalty) == (0, 0, 0)
    assert not fit.generalises


def test_experts_without_tokens_or_without_inputs_are_left_alone() -> None:
    problem = make_problem(8)
    idle = ExpertRows(torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, 6))
    silent = replace(problem.experts[0], inputs=torch.zeros_like(problem.experts[0].inputs))
    changes, _ = solved(replace(problem, experts=[idle, *problem.experts[1:], silent]), 0.3)
    assert set(changes) == {1, 2, 3}
    no_scale = replace(problem, scale=torch.zeros_like(problem.scale))
    assert solved(no_scale, 0.3)[0] == {}


def test_a_stronger_ridge_changes_less_and_fits_less() -> None:
    problem = make_problem(9)
    fits = [solved(problem, rho, sweeps=50) for rho in (0.3, 3.0, 30.0, 1e9)]
    sizes = [sum(float(change.square().sum()) for change in changes.values()) for changes, _ in fits]
    assert sizes == sorted(sizes, reverse=True)
    assert [fit.after for _, fit in fits] == sorted(fit.after for _, fit in fits)
    assert fits[-1][1].after == pytest.approx(fits[-1][1].before, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_gives_the_same_but_for_rounding(shape: str) -> None:
    problem = make_problem(10, **SHAPES[shape])
    single = replace(problem, dtype=torch.float32)
    exact, rounded = (solved(p, 0.3) for p in (problem, single))
    for number, change in exact[0].items():
        assert rounded[0][number].dtype == torch.float32
        error = (rounded[0][number].double() - change).norm() / change.norm()
        assert float(error) < 1e-4
    assert rounded[1].after == pytest.approx(exact[1].after, rel=1e-4)


def test_the_same_problem_gives_the_same_bits() -> None:
    first, second = solved(make_problem(11), 0.3)[0], solved(make_problem(11), 0.3)[0]
    assert all(torch.equal(first[number], second[number]) for number in first)


@pytest.mark.parametrize("rho", [0.0, -1.0, float("inf"), float("nan")])
def test_a_ridge_that_is_none_is_refused(rho: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        solved(make_problem(12), rho)
