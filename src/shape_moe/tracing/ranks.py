"""Several processes, started by ``torchrun``, that share one calibration set: whole folds each, and sums are added."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from shape_moe.calibration.batches import FOLDS, Batch
from shape_moe.errors import UsageError
from shape_moe.tracing.trace import Trace, merge_traces

if TYPE_CHECKING:
    from shape_moe.calibration.example_maker import ExampleMaker
    from shape_moe.calibration.examples import Example

Made = TypeVar("Made")


@dataclass(frozen=True)
class Ranks:
    """The processes that work together.

    Attributes:
        rank: which of them this is, from 0.
        count: how many there are.
        local: which of those on this machine this is.

    Raises:
        UsageError: for more processes than folds.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    def __post_init__(self) -> None:
        if self.count > FOLDS:
            raise UsageError(
                f"{self.count} processes share {FOLDS} folds of examples: start {FOLDS} at most (--nproc-per-node)."
            )

    @classmethod
    def of_this_run(cls) -> Ranks:
        """What ``torchrun`` says in the environment; one process without it."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))

    def device(self, asked: str) -> str:
        """Where the model of this process runs: each has a GPU of its own, where nothing else is asked."""
        import torch

        if self.count == 1 or asked != "auto" or not torch.cuda.is_available():
            return asked
        return f"cuda:{self.local}"

    @property
    def leads(self) -> bool:
        """Whether this process writes the result and talks to the user."""
        return self.rank == 0

    def share(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches of this process: those of whole folds.

        Raises:
            UsageError: where there is no fold for every process.
        """
        folds = sorted({int(batch.folds[0]) for batch in batches})
        if len(folds) < self.count:
            raise UsageError(f"The examples fill {len(folds)} folds: start {len(folds)} processes at most.")
        mine = {fold for place, fold in enumerate(folds) if place % self.count == self.rank}
        return [batch for batch in batches if int(batch.folds[0]) in mine]

    def examples(self, maker: ExampleMaker, make: Callable[[], list[Example]]) -> list[Example]:
        """The calibration set, made by the first process and the same in all."""
        made = self.once(make)
        maker.examples = made
        return made

    def once(self, make: Callable[[], Made]) -> Made:
        """What the first process makes, in all."""
        if self.count == 1:
            return make()
        distributed = _group()
        held: list[Any] = [make() if self.leads else None]
        distributed.broadcast_object_list(held, src=0)
        made: Made = held[0]
        return made

    def merged(self, trace: Trace) -> Trace:
        """The trace of all processes, at the first of them; the others get back what they have made."""
        if self.count == 1:
            return trace
        distributed = _group()
        held: list[Any] | None = [None] * self.count if self.leads else None
        part = (dict(trace.statistics), trace.coalitions)
        distributed.gather_object(part, held, dst=0)
        if held is None:
            return trace
        parts = [Trace(trace.info, statistics, coalitions) for statistics, coalitions in held]
        both = merge_traces(parts, pool=True)
        return replace(both, info=replace(trace.info, classes=both.info.classes))


def _group() -> Any:
    """The processes' way to talk to each other; CPU memory is enough for what they say."""
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    return distributed
