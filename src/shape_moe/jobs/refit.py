"""A repair without training: the kept experts' down projections solved again, and judged before they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.fingerprint import fingerprint, layout_fingerprint
from shape_moe.architectures.sites import find_sites
from shape_moe.calibration.batches import batches
from shape_moe.calibration.example_maker import ExampleMaker
from shape_moe.calibration.records import DataOptions
from shape_moe.calibration.responses import pad_token_id
from shape_moe.calibration.sources import Data
from shape_moe.errors import UsageError, one_of
from shape_moe.evaluation.bench import Bench
from shape_moe.evaluation.intervals import Bootstrap
from shape_moe.jobs.held_out import held_out_set
from shape_moe.jobs.search import layered_bench, open_layers
from shape_moe.jobs.session import DEFAULT_SAMPLES, ExampleOptions, ModelSession, as_example_options
from shape_moe.progress import SILENT, Progress
from shape_moe.refitting.refitted import RHO, LayerFiles, raw_bytes
from shape_moe.selection.selection import Selection
from shape_moe.tracing.token_weights import PredictingWeights, SegmentWeights
from shape_moe.units import readable_kl

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from shape_moe.evaluation.teacher_forced import TeacherForced
    from shape_moe.refitting.layers import RefitRequest
    from shape_moe.refitting.refitted import Refitted

WAYS = ("on", "off", "auto")
RHOS = (0.3, 3.0, 30.0)
"""Strengths that are tried where one is chosen."""


def check_refit(name: str) -> None:
    """Refuse a way to refit that does not exist.

    Raises:
        UsageError: naming those that do.
    """
    one_of(name, WAYS, "--refit")


def refit(
    model: str | PathLike[str] | PreTrainedModel,
    selection: Selection,
    data: ExampleOptions | DataOptions | Data,
    *,
    rho: float = RHO,
    weights: PredictingWeights | SegmentWeights | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    folder: str | PathLike[str] | None = None,
    progress: Progress = SILENT,
) -> Refitted:
    """Solve the kept experts' down projections again, so that the pruned model's stream follows the dense one's.

    Nothing is trained and the model is given back as it was: ``masked(model, selection, weights=found.weights)`` is the
    repaired model. Layer by layer, with ``s`` the dense residual stream behind the layer, ``s'`` the pruned model's, c
    the family's factor on the routed output, ``g'`` the gate weights that the experts receive and ``z`` what enters
    their down projections, the changes ``dD_i`` minimise ``sum_t w_t / |h_t|^2 |(s_t - s'_t) / c - sum_i g'_ti dD_i
    z_ti|^2 + sum_i lambda_i |dD_i|^2``, ``lambda_i = rho * trace(A_i^T A_i) / I`` with ``A_i`` the weighted rows
    ``g' z`` of the expert's tokens. See docs/refit.md.

    Args:
        model: a folder, a hub id, or a live model (then ``tokenizer`` is needed).
        selection: what is kept, with the routing that it is meant for.
        data: the calibration set, as :func:`shape_moe.trace` takes it.
        rho: strength of the ridge towards the original weights. A layer whose residual does not fall on the tenth of
            the tokens that is kept out takes ten times, then a hundred times as much, or is left as it is.
        weights: how much tokens count; None for 1 where a token predicts a response token and 0.25 elsewhere.
        tokenizer: the tokenizer of a live model.
        revision: branch, tag or commit of a hub model.
        folder: where finished layers are kept: the same call goes on from them, any other is refused. None keeps them
            in memory.
        progress: where to show progress.

    Raises:
        UsageError: when the selection does not fit the model, or ``rho`` is not positive.
        CheckpointError: when the folder holds layers of another refit.
        UnsupportedModelError: for a model whose format cannot hold refitted weights.
        ShapeMoeError: when the model or the data cannot be used; the message says what to do.
    """
    from shape_moe.pruning.refitted_tensors import check_refittable, stored_dtype
    from shape_moe.refitting.layers import RefitRequest

    if not 0 < rho < float("inf"):
        raise UsageError(f"rho must be a positive number, not {rho!r}: it says how strongly weights are held back.")
    options = as_example_options(data, DEFAULT_SAMPLES)
    session = ModelSession.open(model, options, tokenizer, progress, revision=revision)
    stored = None
    if session.snapshot is not None:
        check_refittable(session.snapshot)
        stored = stored_dtype(session.snapshot)
    request = RefitRequest(rho, weights or PredictingWeights(), stored)
    found = refit_in_session(session, selection, request, Path(folder) if folder is not None else None)
    for line in found.lines():
        progress.note(line)
    return found


def refit_in_session(
    session: ModelSession, selection: Selection, request: RefitRequest, folder: Path | None
) -> Refitted:
    """Refit a selection of the model that a session holds, by the session's examples.

    Args:
        session: the model and the calibration examples.
        selection: what is kept.
        request: how.
        folder: where finished layers are kept and found again, None for memory.

    Raises:
        ShapeMoeError: see :func:`refit`.
    """
    from shape_moe.architectures.live_layers import LiveLayers
    from shape_moe.refitting.layers import Layers, RefitPass

    maker = session.calibrator
    examples = maker.examples or maker.run(session.answerer, folder)
    layers = max(selection.layers) + 1
    title = f"Refitting with rho {request.rho:g}"
    with ExitStack() as stack:
        engine: Layers
        if session.reads_layers:
            engine = open_layers(session)
        else:
            engine = stack.enter_context(LiveLayers(session.model).attached())
        pad_id = pad_token_id(engine.model, maker.tokeniser)
        todo = list(batches(examples, maker.options.batch_size, pad_id))
        advance = stack.enter_context(session.progress.phase(title, layers, "layer"))
        files = LayerFiles(folder, _told_from_others(session) if folder is not None else "")
        return RefitPass(engine, selection, todo, request, files).run(advance)


def _told_from_others(session: ModelSession) -> str:
    """What tells a session's model from others: for a live one its routers and one expert of every layer."""
    if session.snapshot is not None:
        return f"{fingerprint(session.snapshot)} {layout_fingerprint(session.snapshot)}"
    found = hashlib.sha256()
    for site in find_sites(session.model):
        experts: Any = site.experts
        for tensor in (*site.router.parameters(), experts.down_proj[0]):
            found.update(raw_bytes(tensor) if not tensor.is_meta else b"")  # offloaded
    return found.hexdigest()


@dataclass(frozen=True)
class ChosenRefit:
    """What came of trying refits.

    Attributes:
        selection: the selection, with its weights where a refit was taken.
        notes: what the user should know.
    """

    selection: Selection
    notes: tuple[str, ...] = ()


def choose_refit(
    session: ModelSession,
    selection: Selection,
    chosen_by: ExampleMaker,
    stored: torch.dtype,
    folder: Path,
    *,
    always: bool,
) -> ChosenRefit:
    """Refit a selection with each strength of the ridge, and take what is closest to the dense model.

    Args:
        session: the model and the calibration examples.
        selection: what is kept.
        chosen_by: the examples that decide, which calibrate nothing and report nothing.
        stored: dtype in which the weights will be stored.
        folder: where candidates are kept, and found again by a later run.
        always: take the best refit even where the selection without one is as good.
    """
    from shape_moe.refitting.layers import RefitRequest

    progress = session.progress
    found = []
    for rho in RHOS:
        request = RefitRequest(rho, stored=stored)
        found.append(refit_in_session(session, selection, request, folder / f"rho-{rho:g}"))
    candidates: list[Selection] = [selection, *(one.applied_to(selection) for one in found)]
    sums = _judged(session, chosen_by, candidates, folder)
    draws = Bootstrap(len(sums[0].tokens), comparisons=len(candidates))
    divergences = [draws.ratio(of.kl, of.tokens).value for of in sums]
    best = min(range(1, len(candidates)), key=lambda i: (divergences[i], -i))
    gain = draws.ratio(sums[0].kl - sums[best].kl, sums[0].tokens)
    worth = always or gain.low > 0
    tried = [{"rho": None if i == 0 else RHOS[i - 1], "kl": kl} for i, kl in enumerate(divergences)]
    said = (
        f"KL divergence to the dense model on {len(sums[0].tokens)} examples: {readable_kl(divergences[0])} as "
        f"pruned, {readable_kl(divergences[best])} refitted with rho {RHOS[best - 1]:g}"
    )
    if not worth:
        progress.note(f"Not refitted, because no refit is clearly closer to the dense model. {said}.")
        return ChosenRefit(selection)
    chosen, refitted = candidates[best], found[best - 1]
    for line in (*refitted.lines(), f"{said}."):
        progress.note(line)
    worse = divergences[best] >= divergences[0]
    notes = ("The refit does not bring the model closer to the dense one; leave --refit on out.",) if worse else ()
    return ChosenRefit(replace(chosen, refit={**(chosen.refit or {}), "tried": tried}), notes)


def _judged(
    session: ModelSession, chosen_by: ExampleMaker, candidates: Sequence[Selection], folder: Path
) -> list[TeacherForced]:
    """Teacher-forced sums of every candidate beside the dense model; where layers are read from disk in one reading."""
    progress, name = session.progress, "the choosing part"
    if session.reads_layers:
        with layered_bench(session, chosen_by, name, 1, 0, folder) as layered:
            layered.prepare(candidates)
            return [layered.sums(candidate) for candidate in candidates]
    held_out = held_out_set(session, chosen_by, name, folder)
    with (
        Bench(session.model, session.tokenizer, held_out, folder=folder, progress=progress) as bench,
        progress.phase("Judging refits", len(candidates) * len(held_out.examples), "example") as advance,
    ):
        return [bench.sums(candidate, advance) for candidate in candidates]
