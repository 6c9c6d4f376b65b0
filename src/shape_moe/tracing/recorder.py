"""Accumulators of one MoE layer: what is added up while a model runs, on the device on which it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from shape_moe.calibration.batches import CELLS, FOLDS, PADDING, SEGMENTS
from shape_moe.errors import ShapeMoeError, first_line
from shape_moe.tracing.batch_context import BatchContext, Places
from shape_moe.tracing.coalitions import CoalitionTable, merge_tables, tabulate
from shape_moe.tracing.observed import Observed
from shape_moe.tracing.replacement import NextChoice, WiderChoice, next_ids_and_weights
from shape_moe.tracing.statistics import HALVES, Per, Reduction, Statistic, statistics

if TYPE_CHECKING:
    from shape_moe.architectures.moe_config import MoeConfig
    from shape_moe.tracing.stored_statistics import Array

_COMPACT_ROWS = 200_000
_NOT_FINITE = (
    "Layer {layer}: the experts' {what} are not finite; the checkpoint has NaN or infinite weights, "
    "or its dtype overflows."
)


class LayerRecorder:
    """Sums over the tokens of one layer.

    Args:
        layer: decoder-layer index, for messages.
        moe: facts about the routed experts.
        recorded: the statistics to record, None for all that are installed.
        classes: how many classes of examples there are.
    """

    def __init__(
        self,
        layer: int,
        moe: MoeConfig,
        recorded: Sequence[Statistic] | None = None,
        classes: int = 1,
    ) -> None:
        self._kinds = (classes, len(CELLS))
        self._cells_in_all = classes * len(CELLS) * FOLDS
        self._halves_in_all = classes * len(CELLS) * HALVES
        self.layer, self.moe, self.num_experts = layer, moe, moe.num_experts
        self.recorded = tuple(statistics().values() if recorded is None else recorded)
        self.wants_next = moe.has_next_choice and any(s.next_choice for s in self.recorded)
        self.context: BatchContext | None = None
        self.residual: torch.Tensor | None = None
        self.normed: torch.Tensor | None = None
        self.router_logits: torch.Tensor | None = None
        self.wider: WiderChoice | None = None
        self.calls = 0
        self.waits = False
        self._waiting: Observed | None = None
        self._checked = False
        self._sums: dict[str, torch.Tensor] = {}
        self._kept: Mapping[str, Array] = {}
        self._finite: torch.Tensor | None = None
        self._ids: list[torch.Tensor] = []
        self._cells: list[torch.Tensor] = []
        self._table: CoalitionTable | None = None

    @property
    def recording(self) -> bool:
        """Whether a batch is under way; other forward passes leave no trace."""
        return self.context is not None

    def start(self, context: BatchContext) -> None:
        """Begin a batch."""
        self.context, self.calls, self._waiting = context, 0, None

    def _of(self, per: Per, reduction: Reduction = "sum") -> tuple[Statistic, ...]:
        """The recorded statistics of one kind, in the order of their columns."""
        return tuple(s for s in self.recorded if s.per == per and s.reduction == reduction)

    def _accumulators(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The running sums, padding's cell last, on the device that runs the layer (or where it can have float64)."""
        if not self._sums:
            home = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
            cells, experts = self._cells_in_all + 1, self.num_experts
            shapes = {
                "slot": (cells * experts, len(self._of("slot"))),
                "largest": (len(self._of("slot", "max")), cells * experts),
                "expert": (len(self._of("expert")), cells, experts),
                "token": (cells, len(self._of("token"))),
                "pair": (len(self._of("pair")), (self._halves_in_all + 1) * experts * experts),
            }
            self._sums = {k: torch.zeros(s, dtype=torch.float64, device=home) for k, s in shapes.items()}
            for name, array in self._kept.items():
                self._sums[name].copy_(torch.from_numpy(array))
            self._kept = {}
        return self._sums

    @torch.no_grad()
    def add(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        gates: torch.Tensor,
        outputs: torch.Tensor,
        run: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Add one call of the experts module.

        Args:
            hidden: the module's input [T, H].
            ids: experts of every token [T, k].
            gates: gate weights as received [T, k].
            outputs: expert outputs before weighting [T, k, H].
            run: gives the outputs of other experts, from ids [T, 1] to [T, 1, H].

        Raises:
            ShapeMoeError: when the batch's segments do not fit, when the residual stream is not the one that feeds
                this block, or when a statistic fails.
        """
        context, residual, logits = self._check_call(hidden)
        sums = self._accumulators(outputs.device)
        places = context.on(sums["slot"].device)
        ids, g = ids.to(places.cells.device, torch.int64), gates.to(places.cells.device, torch.float64)
        seen = Observed(
            h=residual,
            ids=ids,
            g=g,
            outputs=outputs,
            router_logits=logits,
            segments=places.segments,
            folds=places.folds,
            residual_scale=self.moe.residual_scale,
            router_scores=self.moe.family.router_scores,
            renormalises=self.moe.renormalises,
            next=self._next(ids, g, run) if self.wants_next else None,
        )
        if self.waits:
            self._waiting = seen
        else:
            self._record(seen)

    def settle(self, residual: torch.Tensor, joined: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Record what waited until its layer was done.

        Args:
            residual: what the block's output is added to [B, T, H].
            joined: gives experts' outputs [T, n, *] as they reach that sum [T, n, H].
        """
        seen, self._waiting = self._waiting, None
        assert seen is not None, "the experts have run"
        following = seen.next
        if following is not None:
            following = replace(following, outputs=joined(following.outputs.unsqueeze(1)).squeeze(1))
        h = residual.reshape(len(seen.ids), -1)
        self._record(replace(seen, h=h, outputs=joined(seen.outputs), next=following))

    def _record(self, seen: Observed) -> None:
        assert self.context is not None
        sums = self._accumulators(seen.outputs.device)
        places = self.context.on(sums["slot"].device)
        self._add_slots(seen, places, sums)
        self._add_tokens(seen, places, sums)
        self._add_pairs(seen, places, sums)
        finite = torch.isfinite(seen.output_square).all()
        self._finite = finite if self._finite is None else self._finite & finite
        self._ids.append(seen.ids.to(torch.int16))

    def _next(self, ids: torch.Tensor, g: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor]) -> NextChoice:
        """The router's next choice, run in a call of its own: the model's own call stays as it is, bit for bit."""
        wider, self.wider = self.wider, None
        assert wider is not None, "the router has run"
        chosen, weights = next_ids_and_weights(ids, g, wider, renormalises=self.moe.renormalises)
        outputs = run(chosen.unsqueeze(1).to(wider.ids.device)).squeeze(1)
        return NextChoice(outputs, weights)

    def _add_slots(self, seen: Observed, places: Places, sums: dict[str, torch.Tensor]) -> None:
        index = (places.cells.unsqueeze(1) * self.num_experts + seen.ids).flatten()
        columns = [self._terms(s, seen, seen.ids.shape) for s in self._of("slot")]
        if columns:
            _add_at(sums["slot"], index, torch.stack(columns, dim=-1).flatten(0, 1))
        for row, statistic in enumerate(self._of("slot", "max")):
            terms = self._terms(statistic, seen, seen.ids.shape)
            sums["largest"][row].scatter_reduce_(0, index, terms.flatten(), "amax")

    def _add_tokens(self, seen: Observed, places: Places, sums: dict[str, torch.Tensor]) -> None:
        tokens = len(seen.ids)
        columns = [self._terms(s, seen, (tokens,)) for s in self._of("token")]
        if columns:
            _add_at(sums["token"], places.cells, torch.stack(columns, dim=-1))
        one_hot = places.one_hot.to(torch.float64)
        for row, statistic in enumerate(self._of("expert")):
            sums["expert"][row, places.present] += one_hot @ self._terms(statistic, seen, (tokens, self.num_experts))

    def _add_pairs(self, seen: Observed, places: Places, sums: dict[str, torch.Tensor]) -> None:
        pair = seen.ids.unsqueeze(2) * self.num_experts + seen.ids.unsqueeze(1)
        index = (pair + places.half_cells[:, None, None] * self.num_experts**2).flatten()
        for row, statistic in enumerate(self._of("pair")):
            _add_at(sums["pair"][row], index, self._terms(statistic, seen, pair.shape).flatten())

    def _terms(self, statistic: Statistic, seen: Observed, shape: tuple[int, ...]) -> torch.Tensor:
        """What a statistic gives for these tokens, float64 where the sums are."""
        try:
            terms = statistic.function(seen)
            found = tuple(terms.shape)
            terms = terms.to(seen.g)
        except (ShapeMoeError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # other packages' code: named, and never a traceback
            raise ShapeMoeError(f"Statistic {statistic.name!r} failed: {first_line(error)}") from error
        if found != tuple(shape):
            raise ShapeMoeError(
                f"Statistic {statistic.name!r} must give one term per {statistic.per}, {tuple(shape)}, not {found}."
            )
        return terms

    def _check_call(self, hidden: torch.Tensor) -> tuple[BatchContext, torch.Tensor, torch.Tensor]:
        """The running batch, its residual stream [T, H] and its router logits [T, E]."""
        context, residual, normed, logits = self.context, self.residual, self.normed, self.router_logits
        if context is None or residual is None or normed is None:
            raise ShapeMoeError(
                f"Layer {self.layer}: the experts ran before the norm of their residual stream; "
                "the family's facts do not fit this model."
            )
        if logits is None:
            raise ShapeMoeError(
                f"Layer {self.layer}: the experts ran before their router; the family's facts do not fit this model."
            )
        logits = logits.reshape(-1, self.num_experts).float()
        for found in (hidden, logits):
            self._check_length(context, len(found))
        if not self._checked:
            self._check_residual(normed, hidden)
        self.calls += 1
        self.residual = self.normed = self.router_logits = None
        return context, residual.reshape(len(hidden), -1), logits

    def _check_residual(self, normed: torch.Tensor, hidden: torch.Tensor) -> None:
        """Once per layer: the experts' input must be the norm of the residual stream that was recorded."""
        if not bool(torch.isfinite(hidden).all()):
            raise ShapeMoeError(_NOT_FINITE.format(layer=self.layer, what="inputs"))
        if normed.shape[-1] != hidden.shape[-1] or not torch.equal(normed.reshape(hidden.shape), hidden):
            raise ShapeMoeError(
                f"Layer {self.layer}: the experts' input is not the norm of the residual stream; "
                "the family's facts do not fit this model."
            )
        self._checked = True

    def _check_length(self, context: BatchContext, tokens: int) -> None:
        if tokens != len(context.segments):
            raise ShapeMoeError(
                f"Layer {self.layer}: the experts received {tokens} tokens where the batch has "
                f"{len(context.segments)}: the model drops or repeats tokens, so nobody knows which are prompt."
            )

    def finish(self) -> None:
        """End a batch.

        Raises:
            ShapeMoeError: when the experts did not run exactly once, or gave values that are not finite.
        """
        context, self.context = self.context, None
        if context is None or self.calls != 1 or self._waiting is not None:
            raise ShapeMoeError(
                f"Layer {self.layer}: the experts ran {self.calls} times in one forward pass instead of once; "
                "something bypasses the experts interface."
            )
        if self._finite is not None and not bool(self._finite):
            raise ShapeMoeError(_NOT_FINITE.format(layer=self.layer, what="outputs"))
        self._cells.append(torch.where(context.kinds == PADDING, -1, context.kinds * FOLDS + context.folds))
        if sum(len(cells) for cells in self._cells) > _COMPACT_ROWS:
            self._compact()

    def _compact(self) -> None:
        if not self._ids:
            return
        members = torch.cat([ids.cpu() for ids in self._ids]).numpy()
        cells = torch.cat(self._cells).numpy()
        real = cells >= 0
        kinds, folds = np.divmod(cells[real], FOLDS)
        of_class, kinds = np.divmod(kinds, len(CELLS))
        table = tabulate(members[real], kinds // len(SEGMENTS), folds, kinds % len(SEGMENTS), of_class)
        self._table = table if self._table is None else merge_tables([self._table, table], [1, 1])
        self._ids, self._cells = [], []

    def coalitions(self) -> CoalitionTable:
        """The coalitions of all batches so far."""
        self._compact()
        assert self._table is not None
        return self._table

    def state(self) -> dict[str, Array]:
        """The running sums as they are, and the coalition table: what :meth:`restore` goes on from, bit for bit."""
        table = self.coalitions()
        sums = {name: tensor.cpu().numpy() for name, tensor in self._sums.items()}
        found = {"members": table.members, "counts": table.counts, "classes": table.classes}
        counted = {name: np.ascontiguousarray(array) for name, array in found.items()}
        return {**(sums or self._kept), **counted}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from the state of a recorder of the same layer and statistics."""
        table = {name: np.asarray(state[name]) for name in ("members", "counts", "classes")}
        self._table = CoalitionTable(**table)
        self._kept = {name: np.asarray(a) for name, a in state.items() if name not in table}

    def statistics(self) -> dict[str, Array]:
        """Every recorded statistic of this layer over all batches so far, without the layer axis.

        Raises:
            ShapeMoeError: when a statistic is not finite.
        """
        state = self.state()
        cells, size = (*self._kinds, FOLDS), self._cells_in_all
        result: dict[str, Array] = {}
        for column, statistic in enumerate(self._of("slot")):
            result[statistic.name] = state["slot"][: size * self.num_experts, column].reshape(*cells, -1)
        for row, statistic in enumerate(self._of("slot", "max")):
            result[statistic.name] = state["largest"][row, : size * self.num_experts].reshape(*cells, -1)
        for row, statistic in enumerate(self._of("expert")):
            result[statistic.name] = state["expert"][row, :size].reshape(*cells, -1)
        for column, statistic in enumerate(self._of("token")):
            result[statistic.name] = state["token"][:size, column].reshape(cells)
        square = (self.num_experts, self.num_experts)
        for row, statistic in enumerate(self._of("pair")):
            values = state["pair"][row, : self._halves_in_all * self.num_experts**2]
            result[statistic.name] = values.reshape(*self._kinds, HALVES, *square)
        for statistic in self.recorded:
            if not np.isfinite(result[statistic.name]).all():
                raise ShapeMoeError(f"Layer {self.layer}: statistic {statistic.name!r} is not finite.")
            if statistic.whole:
                result[statistic.name] = np.rint(result[statistic.name]).astype(np.int64)
        return result


def _add_at(sums: torch.Tensor, index: torch.Tensor, terms: torch.Tensor) -> None:
    """Add terms to rows of sums, in the same order every time.

    ``index_add_`` is faster on CPUs; elsewhere its atomic additions come in any order, and the last bits with them,
    while an accumulating ``index_put_`` sorts first.
    """
    if sums.device.type == "cpu":
        sums.index_add_(0, index, terms)
    else:
        sums.index_put_((index,), terms, accumulate=True)
