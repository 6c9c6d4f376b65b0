"""Layer curves within a budget: how much of the grid and the examples is measured, how long that takes, doing it."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.families import FAMILIES
from shape_moe.architectures.loading import vocabulary_size
from shape_moe.architectures.moe_config import RouterFacts, check_gate_scale
from shape_moe.architectures.sites import decoder_layers
from shape_moe.calibration.example_maker import ExampleMaker
from shape_moe.calibration.responses import pad_token_id
from shape_moe.calibration.seen_prompts import SeenPrompts
from shape_moe.errors import DataError, UsageError
from shape_moe.evaluation.held_out_set import HeldOutSet
from shape_moe.jobs.session import ModelSession
from shape_moe.journal import Journal
from shape_moe.progress import Progress
from shape_moe.scoring.registry import ScoreOptions, get_scorer
from shape_moe.scoring.scores import Scores, score_trace
from shape_moe.selection.budget import Constraints, Room
from shape_moe.selection.layer_curves import LayerCurves, counts_to_measure, load_curves
from shape_moe.selection.method import Method
from shape_moe.selection.rules import layer_ranks
from shape_moe.selection.selection import Selection, whole_selection
from shape_moe.source_files import describe_inputs
from shape_moe.tracing.classes import NO_CLASS
from shape_moe.tracing.trace import Trace
from shape_moe.units import counted

if TYPE_CHECKING:
    from shape_moe.calibration.batches import Batch
    from shape_moe.calibration.examples import Example

MOST_TOKENS = 8192
"""Layers are measured over at most so many tokens of the calibration examples."""
LEAST_TOKENS = 2048
"""Before fewer tokens than this are measured, fewer counts are."""
ENOUGH_COUNTS = 6
"""Before fewer counts than this are measured, fewer tokens are."""
LEAST_COUNTS = 3
"""Fewer counts make no curve."""
JOURNAL = "layer-passes.jsonl"
"""What an unfinished measurement has done so far."""
clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        counts: how many counts in each layer.
        tokens: over at most so many tokens.
    """

    counts: int
    tokens: int


def extent_within(passes: float | None, counts: int, layers: float, tokens: int) -> Extent:
    """The largest measurement within a budget: fewer counts first, then fewer tokens, then fewer of both.

    Args:
        passes: the budget, in forward passes of the whole calibration set; None for no bound but
            :data:`MOST_TOKENS`.
        counts: counts of the whole grid.
        layers: what one count in every layer costs in passes over the same tokens: the sum over MoE layers of the
            share of the model from that layer on.
        tokens: of the calibration set.
    """
    most = min(tokens, MOST_TOKENS)
    if passes is None:
        return Extent(counts, most)

    def affordable(share_of: int) -> int:
        return math.floor(passes * tokens / (layers * share_of))

    enough = min(counts, ENOUGH_COUNTS)
    if (fits := affordable(most)) >= enough:
        return Extent(min(fits, counts), most)
    reduced = math.floor(passes * tokens / (layers * enough))
    if reduced >= min(most, LEAST_TOKENS):
        return Extent(enough, reduced)
    least = min(counts, LEAST_COUNTS)
    if (fits := affordable(min(most, LEAST_TOKENS))) >= least:
        return Extent(min(fits, enough), min(most, LEAST_TOKENS))
    return Extent(least, max(1, math.floor(passes * tokens / (layers * least))))


class CurveMaker:
    """Makes layer curves of one model over its calibration examples, each scorer and routing once.

    Args:
        session: gives the model.
        maker: the calibration examples.
        trace: the trace that ranks the experts.
        scoring: weights and seed.
        progress: where to show progress.
        passes: what one set of curves may cost, in forward passes of the calibration set; None for the whole grid.
        folder: where curves and single passes are kept for a later run, None for nowhere.

    Attributes:
        budget: the same as ``passes``; it may change before curves are made.
        journal: file of the single passes, None for none.
    """

    def __init__(
        self,
        session: ModelSession,
        maker: ExampleMaker,
        trace: Trace,
        scoring: ScoreOptions,
        progress: Progress,
        *,
        passes: float | None = None,
        folder: Path | None = None,
    ) -> None:
        self.session, self.maker, self.trace, self.scoring = session, maker, trace, scoring
        self.progress, self.budget, self.folder = progress, passes, folder
        self.journal = folder and folder / JOURNAL
        self._made: dict[tuple[str, str], LayerCurves] = {}

    @cached_property
    def examples(self) -> list[Example]:
        """All calibration examples."""
        examples = self.maker.examples or self.maker.run(self.session.answerer, None)
        if not any(example.spans for example in examples):
            raise DataError(f"No example of {self.maker.data.name} holds a response, so no token predicts one.")
        return list(examples)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all of them."""
        return sum(len(example.tokens) for example in self.examples)

    @cached_property
    def _layers(self) -> float:
        count = len(decoder_layers(self.session.model))
        return sum((count - layer) / count for layer in self.trace.info.layers)

    @property
    def _ran(self) -> str:
        """What tells the model, and how it runs, from others: its files, dtype and device."""
        session = self.session
        files = describe_inputs([session.snapshot.path]) if session.snapshot is not None else {}
        described = {name: asdict(file) for name, file in files.items()}
        return json.dumps([self.trace.info.fingerprint, described, str(session.model.dtype), str(session.model.device)])

    def _weights(self, method: Method) -> ScoreOptions:
        weights = get_scorer(method.scorer).weights_for(self.trace, self.scoring.weights)
        return replace(self.scoring, weights=weights)

    def _planned(self, method: Method) -> tuple[tuple[int, ...], list[Example]]:
        """Counts and examples."""
        facts, experts = self.trace.info.routing, self.trace.info.num_experts
        grid = counts_for(experts, facts, method, None)
        extent = extent_within(self.budget, len(grid), self._layers, self.tokens)
        return counts_for(experts, facts, method, extent.counts), within_reach(self.examples, extent.tokens)

    def passes(self, method: Method) -> float:
        """What the curves of a method cost, in forward passes of the calibration set; 0 where they are there."""
        if self.known(method) is not None:
            return 0.0
        counts, examples = self._planned(method)
        share = sum(len(example.tokens) for example in examples) / self.tokens
        return (1 + len(counts) * self._layers) * share

    def seconds(self, method: Method) -> float:
        """About how long they take: by the time of one pass of the first batch."""
        from shape_moe.evaluation.layer_costs import seconds_of_a_pass

        if self.known(method) is not None:
            return 0.0
        counts, examples = self._planned(method)
        todo = self._batches(examples)
        first = max(todo, key=lambda batch: batch.input_ids.numel())
        whole = whole_selection(self.trace.info.layers, self.trace.info.num_experts)
        cut = replace(whole, layers={layer: ids[:-1] for layer, ids in whole.layers.items()})
        taken = min(seconds_of_a_pass(self.session.model, first, cut, clock) for _ in range(2))
        share = sum(batch.input_ids.numel() for batch in todo) / first.input_ids.numel()
        return taken * share * (1 + len(counts) * self._layers)

    def known(self, method: Method) -> LayerCurves | None:
        """Curves that were made before, by this run or an interrupted one."""
        key = (method.scorer, method.routed)
        file = self._file(method)
        if key not in self._made and file is not None and file.is_file():
            self._made[key] = load_curves(file)
        return self._made.get(key)

    def _file(self, method: Method) -> Path | None:
        return None if self.folder is None else self.folder / curves_file(method)

    def of(self, method: Method) -> LayerCurves:
        """The layer curves for a method's scorer and routing.

        Raises:
            UsageError: when the scorer does not fit the trace.
            DataError: when no example holds a response.
        """
        found = self.known(method)
        if found is None:
            found = self._made[method.scorer, method.routed] = self.measured(method)
            if (file := self._file(method)) is not None:
                found.save(file)
        return found

    def _batches(self, examples: Sequence[Example]) -> list[Batch]:
        model = self.session.model
        held = HeldOutSet(
            "the calibration set",
            tuple(examples),
            tuple(example.group for example in examples),
            self.maker.options.batch_size,
            pad_token_id(model, self.maker.tokeniser),
            vocabulary=vocabulary_size(model),
        )
        return [batch for _, batch in held.batches()]

    def measured(self, method: Method) -> LayerCurves:
        """Measure them, from where an interrupted run stopped."""
        from shape_moe.evaluation.layer_costs import layer_costs

        info, scoring = self.trace.info, self._weights(method)
        check_gate_scale(method.gate_scale, FAMILIES.get(info.family or ""), info.routing.renormalises)
        scores = score_trace(self.trace, method.scorer, scoring)
        counts, examples = self._planned(method)
        cuts = cuts_of(scores, info.routing, method, counts)
        todo = self._batches(examples)
        classes = info.classes if len(info.classes) > 1 else (NO_CLASS,)

        def class_of(group: str | None) -> int:
            name = group or NO_CLASS
            return classes.index(name) if len(classes) > 1 and name in classes else 0

        tokens = sum(len(example.tokens) for example in examples)
        self.progress.note(
            f"Measuring {counted(len(cuts), 'layer')} at {counted(len(counts), 'count')} each over {tokens:,} tokens "
            f"of {counted(len(examples), 'example')} ({method.scorer}, {method.routed})."
        )
        journal: Journal[list[Any]] = Journal(self.journal, "part", "sums")
        passes = len(todo) * len(cuts) * len(counts)
        with self.progress.phase("Measuring layers", passes, "cut") as advance:
            sums, predicting = layer_costs(
                self.session.model,
                todo,
                cuts,
                class_of,
                len(classes),
                advance,
                journal,
                _digest(method, self._ran, scores, counts, todo),
            )
        weights = scoring.weights
        assert weights is not None
        return LayerCurves(
            fingerprint=info.fingerprint,
            model=info.model,
            scorer=method.scorer,
            options={**weights.flags, "seed": scoring.seed},
            routing=method.routing,
            gate_scale=method.gate_scale,
            num_experts=info.num_experts,
            layers=info.layers,
            counts=counts,
            classes=classes,
            tokens=predicting.tolist(),
            sums=sums.tolist(),
            seen=SeenPrompts.of_source(info.source).with_records(self.maker.records).by_salt(),
        )


def curves_file(method: Method) -> str:
    """What the curves of a method are called in a folder."""
    return f"curves-{method.scorer}-{method.routed.replace(', ', '-')}.json"


def _digest(method: Method, ran: str, scores: Scores, counts: Sequence[int], todo: Sequence[Batch]) -> str:
    """What decides the sums of a batch and a layer, so that those of another measurement are not taken for them."""
    found = hashlib.sha256(json.dumps([asdict(method), ran, list(counts)]).encode())
    for array in (scores.values, scores.tiebreak):
        found.update(array.tobytes())
    for batch in todo:
        for tensor in (batch.input_ids, batch.cells, batch.folds):
            found.update(tensor.numpy().tobytes())
        found.update(json.dumps([example.group for example in batch.examples]).encode())
    return found.hexdigest()[:16]


def counts_for(experts: int, facts: RouterFacts, method: Method, most: int | None = None) -> tuple[int, ...]:
    """Counts at which layers are measured; see :func:`shape_moe.selection.layer_curves.counts_to_measure`.

    Raises:
        UsageError: when no layer may lose an expert.
    """
    groups, floor = _groups_and_floor(facts, method)
    counts = counts_to_measure(experts, floor, groups, most)
    if not counts:
        raise UsageError(f"Every layer must keep all of its {experts} experts: there is nothing to measure.")
    return counts


def _groups_and_floor(facts: RouterFacts, method: Method) -> tuple[int, int]:
    """Router groups that keep equal counts, and the fewest experts of a layer: under ``drop`` nothing binds."""
    return (facts.groups, facts.floor) if method.routing == "reroute" else (1, 1)


def cuts_of(scores: Scores, facts: RouterFacts, method: Method, counts: Sequence[int]) -> dict[int, list[Selection]]:
    """For each layer, the selections that cut it alone to so many experts.

    Args:
        scores: rank the experts.
        facts: of the router.
        method: says in which routing.
        counts: experts that the layer keeps.
    """
    groups, floor = _groups_and_floor(facts, method)
    experts, ranks = scores.num_experts, layer_ranks(scores.values, scores.tiebreak)
    room = Room(len(scores.layers), experts, Constraints(floor=floor, groups=groups))
    order = room.order(ranks.astype(float), ranks)
    whole = replace(whole_selection(scores.layers, experts), routing=method.routing, gate_scale=method.gate_scale)
    cuts = {}
    for row, layer in enumerate(scores.layers):
        kept = [sorted(int(i) for i in order[row][:, : count // groups].ravel()) for count in counts]
        cuts[layer] = [replace(whole, layers={layer: ids}) for ids in kept]
    return cuts


def within_reach(examples: Sequence[Example], most_tokens: int) -> list[Example]:
    """The first examples of every class in turn, up to so many tokens; one at least."""
    turns: dict[str | None, int] = {}
    order = []
    for number, example in enumerate(examples):
        turn = turns[example.group] = turns.get(example.group, -1) + 1
        order.append((turn, number))
    chosen: list[Example] = []
    tokens = 0
    for _, number in sorted(order):
        tokens += len(examples[number].tokens)
        if chosen and tokens > most_tokens:
            break
        chosen.append(examples[number])
    return chosen
