"""What can be asked of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

from shape_moe.calibration.records import DataOptions
from shape_moe.errors import UsageError
from shape_moe.evaluation.faithfulness import FEWEST_RANDOM
from shape_moe.evaluation.footprint import Workload
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.harness import TaskOptions
from shape_moe.evaluation.verdict import MAX_DROP, check_max_drop
from shape_moe.jobs.judging_plan import check_minutes


@dataclass(frozen=True)
class EvaluateOptions:
    """What is measured.

    Attributes:
        also: further examples, of what the pruned model was not made for.
        by: field of the records whose classes are judged one by one.
        generation: how models answer freely, None for not at all.
        tasks: tasks of lm-evaluation-harness, None for none.
        footprint: what to time, None to leave memory and speed out; other work on the machine spoils the figures.
        faithfulness: how many random selections every selection is compared with, 0 for none.
        trace: trace of selections given as files, and of checkpoints that hold none; faithfulness needs one.
        max_drop: the fall, as a share, that the verdict *safe* allows.
        general: ask general prompts of many kinds as well: what was forgotten off the task.
        minutes: the longest that judging may take: of what would take longer, less is judged, and that is said; None
            for any time. Loading, tasks, memory and speed are not counted.
        seed: draws samples, resamples and random selections.
    """

    also: DataOptions | None = None
    by: str | None = None
    generation: GenerationOptions | None = field(default_factory=GenerationOptions)
    tasks: TaskOptions | None = None
    footprint: Workload | None = None
    faithfulness: int = 0
    trace: str | None = None
    max_drop: float = MAX_DROP
    general: bool = True
    minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_max_drop(self.max_drop)
        check_minutes(self.minutes)
        if self.faithfulness and self.faithfulness < FEWEST_RANDOM:
            raise UsageError(f"Faithfulness needs at least {FEWEST_RANDOM} random selections, not {self.faithfulness}.")
