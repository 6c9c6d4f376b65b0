r"""The pass over the layers: every layer of the pruned model is refitted on what the refitted layers below give it.

For a layer, ``s_t`` is the dense model's residual stream behind it, ``s'_t`` that of the pruned model as it runs, with
the layers below refitted already, ``h_t`` the dense stream that feeds the block, ``c`` the family's factor on the
routed output and ``w_t`` the weight of a token (1 where it predicts a response token, else 0.25). The change of the
kept experts' down projections ``dD_i`` minimises

    sum_t w_t / |h_t|^2 * | (s_t - s'_t) / c - sum_i g'_{t,i} dD_i z_{t,i} |^2 + sum_i lambda_i |dD_i|^2

where ``g'`` is what the experts module receives in the pruned model and ``z`` what enters the down projections. The
dense *stream* as target makes up for what the layers below have lost, too. Every tenth token is kept out of the fit: a
layer whose residual on those tokens does not fall, with weights rounded as they are stored and in the model as it runs,
is fitted with a stronger ridge, or left as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from shape_moe.architectures.sites import MoeSite, find_sites, live_moe_config
from shape_moe.calibration.batches import PADDING
from shape_moe.errors import ShapeMoeError, UnsupportedModelError
from shape_moe.progress import Advance
from shape_moe.pruning.down_projections import DownProjections
from shape_moe.pruning.masks import masked
from shape_moe.refitting.refitted import RHO, LayerFiles, LayerRefit, Refitted, raw_bytes
from shape_moe.refitting.seen import ExpertInputs, entering_stream
from shape_moe.refitting.solver import Problem, solve
from shape_moe.selection.selection import Selection
from shape_moe.tracing.token_weights import PredictingWeights, TokenWeights

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    import torch
    from transformers import PreTrainedModel

    from shape_moe.calibration.batches import Batch

_STRONGER = 10.0
_HELD_OUT = 10
"""One token in so many is kept out of the fit."""


class Layers(Protocol):
    """A model whose decoder layers run one at a time, in memory or read from disk."""

    model: PreTrainedModel
    num_layers: int

    def embeddings(self) -> AbstractContextManager[None]:
        """Have the input embeddings in memory."""

    def enter(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """What the first layer receives."""

    def layers(self, start: int = 0, stop: int | None = None) -> Iterator[int]:
        """Each layer in turn."""

    def advance(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Hidden states behind the layer whose turn it is."""


@dataclass(frozen=True)
class RefitRequest:
    """How a refit is made.

    Attributes:
        rho: strength of the ridge towards the original weights, relative to the experts' own inputs.
        weights: how much tokens count.
        stored: dtype in which the weights will be stored, None for the model's own.
        tries: so many strengths a layer may take, each ten times the last, before it is left as it is.
    """

    rho: float = RHO
    weights: TokenWeights = field(default_factory=PredictingWeights)
    stored: torch.dtype | None = None
    tries: int = 3


class RefitPass:
    """Takes calibration batches through the layers, dense and pruned, and refits each layer on the way.

    Args:
        engine: the model.
        selection: what is kept.
        batches: the calibration batches.
        request: how.
        files: where finished layers are kept and found again.

    Raises:
        UsageError: when the selection does not fit the model.
        UnsupportedModelError: for a family whose layers are not linear in the down projections.
    """

    def __init__(
        self,
        engine: Layers,
        selection: Selection,
        batches: Sequence[Batch],
        request: RefitRequest = RefitRequest(),
        files: LayerFiles | None = None,
    ) -> None:
        import torch

        moe = live_moe_config(engine.model)
        if (reason := moe.family.why_no_refit) is not None:
            raise UnsupportedModelError(f"A refit is not possible for {moe.family.model_type}: {reason}.")
        self.engine, self.selection, self.batches, self.request = engine, selection, list(batches), request
        self.files = files or LayerFiles()
        self.sites = {site.layer: site for site in find_sites(engine.model)}
        self.scale = moe.residual_scale
        self.work = torch.promote_types(engine.model.dtype, torch.float32)
        self.rows, self.weights = _rows_and_weights(self.batches, request.weights)
        self.dense: list[torch.Tensor] = []
        self.pruned: list[torch.Tensor] = []

    def run(self, advance: Advance = lambda _: None) -> Refitted:
        """Refit all layers that the selection names.

        Args:
            advance: called with the number of layers done.

        Raises:
            ShapeMoeError: when the model's hidden states are not finite.
            CheckpointError: when the folder of finished layers is that of another refit.
        """
        self.files.claim(self._key())
        said: list[LayerRefit] = []
        with self.engine.embeddings():
            self.dense = [self.engine.enter(b.input_ids, b.attention_mask).cpu() for b in self.batches]
        self.pruned = list(self.dense)
        for layer in self.engine.layers(0, max(self.selection.layers) + 1):
            if layer in self.selection.layers:
                said.append(self._refit(layer))
            else:
                same = self.pruned[0] is self.dense[0]
                self.dense = self._through(self.dense)
                self.pruned = list(self.dense) if same else self._through(self.pruned)
            advance(1)
        return Refitted(self.request.rho, self.files.weights(said), tuple(said))

    def _key(self) -> str:
        """What decides the result beside the model."""
        asked, dtypes = self.request, [str(self.request.stored), str(self.engine.model.dtype)]
        job = [self.selection.digest, asked.rho, asked.tries, asked.weights.parts, dtypes]
        found = hashlib.sha256(json.dumps(job).encode())
        for batch in self.batches:
            for tensor in (batch.input_ids, batch.attention_mask, batch.cells):
                found.update(f"{tuple(tensor.shape)}".encode())
                found.update(raw_bytes(tensor))
        return found.hexdigest()

    def _refit(self, layer: int) -> LayerRefit:
        """Bring both streams behind a layer, and refit it."""
        site, kept = self.sites[layer], self.selection.layers[layer]
        cut = replace(self.selection, layers={layer: kept})
        behind, lengths = self._dense(site)
        if (known := self.files.find(layer)) is not None:
            self.pruned = self._masked(cut, known[1], self.pruned)
            self.dense = behind
            return known[0]
        inputs = ExpertInputs(site, kept)
        plain = self._masked(cut, None, self.pruned, inputs)
        problem = self._problem(site, inputs, behind, plain, lengths)
        found, said, after = self._best(layer, site, cut, problem, behind)
        self.dense, self.pruned = behind, after if after is not None else plain
        self.files.put(said, found)
        return said

    def _dense(self, site: MoeSite) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The dense stream behind a layer, and the length of what feeds its block for every row."""
        import torch

        lengths: list[torch.Tensor] = []

        def keep(hidden: torch.Tensor) -> None:
            lengths.append(hidden.to(self.work).norm(dim=-1).flatten())

        with entering_stream(site, keep):
            behind = self._through(self.dense)
        real = [row >= 0 for row in self.rows]
        return behind, torch.cat([found[mask.to(found.device)] for found, mask in zip(lengths, real, strict=True)])

    def _masked(
        self,
        cut: Selection,
        weights: DownProjections | None,
        stream: list[torch.Tensor],
        inputs: ExpertInputs | None = None,
    ) -> list[torch.Tensor]:
        """The pruned stream behind the layer that a selection cuts."""
        (layer,) = cut.layers
        with ExitStack() as stack:
            stack.enter_context(masked(self.engine.model, cut, weights={layer: weights} if weights else {}))
            if inputs is not None:
                stack.enter_context(inputs.attached())
            return self._through(stream, inputs)

    def _through(self, stream: list[torch.Tensor], inputs: ExpertInputs | None = None) -> list[torch.Tensor]:
        """All batches through the layer whose turn it is."""
        behind = []
        for hidden, batch, rows in zip(stream, self.batches, self.rows, strict=True):
            if inputs is not None:
                inputs.start(rows)
            behind.append(self.engine.advance(hidden, batch.attention_mask).cpu())
        return behind

    def _problem(
        self,
        site: MoeSite,
        inputs: ExpertInputs,
        behind: list[torch.Tensor],
        pruned: list[torch.Tensor],
        lengths: torch.Tensor,
    ) -> Problem:
        import torch

        experts: Any = site.experts
        target = self._missing(behind, pruned).to(lengths.device)
        weights = self.weights.to(lengths)
        scale = torch.where(lengths > 0, weights.sqrt() / lengths.clamp_min(torch.finfo(lengths.dtype).tiny), 0)
        held_out = torch.arange(len(scale), device=scale.device) % _HELD_OUT == _HELD_OUT - 1
        if not bool(target.isfinite().all()):
            raise ShapeMoeError(f"Layer {site.layer}: hidden states are not finite, so it cannot be refitted.")
        return Problem(inputs.rows(), target.div_(self.scale), scale, held_out, bool(experts.has_bias), self.work)

    def _missing(self, behind: list[torch.Tensor], pruned: list[torch.Tensor]) -> torch.Tensor:
        """``s - s'`` of every row [T, H]."""
        import torch

        found = []
        for ours, theirs, rows in zip(behind, pruned, self.rows, strict=True):
            real = rows >= 0
            found.append(ours.flatten(0, -2)[real].to(self.work) - theirs.flatten(0, -2)[real].to(self.work))
        return torch.cat(found)

    def _best(
        self, layer: int, site: MoeSite, cut: Selection, problem: Problem, behind: list[torch.Tensor]
    ) -> tuple[DownProjections | None, LayerRefit, list[torch.Tensor] | None]:
        """The weakest ridge that generalises, what is said of it, and the pruned stream with it; or nothing."""
        kept = cut.layers[layer]
        unknowns = len(kept) * (problem.experts[0].inputs.shape[1] + problem.has_bias)
        tokens = int((problem.scale[~problem.held_out] > 0).sum())
        rho, fit = self.request.rho, None
        for _ in range(self.request.tries):
            store = _Store(site, kept, self.request.stored, self.work)
            fit = solve(problem, rho, store)
            if fit.before > 0 and fit.generalises and store.is_finite:
                after = self._masked(cut, store.weights, self.pruned)
                left, left_out = self._measured(problem, behind, after)
                if left_out < fit.held_out_before:
                    found = (fit.before, left, fit.held_out_before, left_out)
                    return store.weights, LayerRefit(layer, rho, tokens, unknowns, *found), after
            rho *= _STRONGER
            if fit.before == 0:
                break
        assert fit is not None
        same = (fit.before, fit.before, fit.held_out_before, fit.held_out_before)
        return None, LayerRefit(layer, None, tokens, unknowns, *same), None

    def _measured(self, problem: Problem, behind: list[torch.Tensor], after: list[torch.Tensor]) -> tuple[float, float]:
        """The residual in the model as it runs: of the fitted tokens, and of those that were kept out."""
        missing = self._missing(behind, after).to(problem.scale.device).div_(self.scale)
        squares = (missing.square().sum(1).double() * problem.scale.double().square()).nan_to_num(nan=float("inf"))
        return float(squares[~problem.held_out].sum()), float(squares[problem.held_out].sum())


class _Store:
    """Puts changes onto a layer's down projections, rounded to the dtype in which they are stored."""

    def __init__(self, site: MoeSite, kept: Sequence[int], dtype: torch.dtype | None, work: torch.dtype) -> None:
        experts: Any = site.experts
        self._experts, self._kept, self._work = experts, kept, work
        self._dtype = dtype or experts.down_proj.dtype
        self._new: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    @cached_property
    def weights(self) -> DownProjections:
        """The down projections once all changes are there: while they come, memory is short."""
        experts, kept = self._experts, list(self._kept)
        weight = experts.down_proj.detach()[kept].to(self._dtype)
        bias = experts.down_proj_bias.detach()[kept].to(self._dtype) if experts.has_bias else None
        for number, (new, new_bias) in self._new.items():
            weight[number] = new
            if bias is not None and new_bias is not None:
                bias[number] = new_bias
        self._new.clear()
        return DownProjections(weight, bias)

    @property
    def is_finite(self) -> bool:
        """Whether every value is a number that the dtype has."""
        return all(bool(tensor.isfinite().all()) for tensor in self.weights.named().values())

    def __call__(self, number: int, change: torch.Tensor) -> torch.Tensor:
        import torch

        expert = self._kept[number]
        own = self._experts.down_proj.detach()[expert].to(self._work)
        own = own if self._experts.is_transposed else own.T
        width = len(own)
        new, new_bias = (own + change[:width]).to(self._dtype), None
        changes = [new.to(self._work) - own]
        if self._experts.has_bias:
            bias = self._experts.down_proj_bias.detach()[expert].to(self._work)
            new_bias = (bias + change[width]).to(self._dtype)
            changes.append((new_bias.to(self._work) - bias).unsqueeze(0))
        self._new[number] = (new if self._experts.is_transposed else new.T, new_bias)
        return torch.cat(changes)


def _rows_and_weights(batches: Sequence[Batch], weights: TokenWeights) -> tuple[list[torch.Tensor], torch.Tensor]:
    """For every batch the row of the problem that a token is, -1 for padding; and the weights of all rows."""
    import torch

    of_cell = torch.zeros(4, dtype=torch.float64)
    for factor, places in weights.parts:
        of_cell[list(places)] = factor
    rows: list[torch.Tensor] = []
    found: list[torch.Tensor] = []
    count = 0
    for batch in batches:
        cells = batch.cells
        real = cells.ne(PADDING)
        numbers, here = torch.full_like(cells, -1), int(real.sum())
        numbers[real] = torch.arange(count, count + here)
        count += here
        rows.append(numbers)
        found.append(of_cell[cells[real]])
    return rows, torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)
