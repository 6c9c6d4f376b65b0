"""What can be asked of the jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shape_moe.calibration.example_maker import AnswerOptions
from shape_moe.calibration.examples import TokenOptions
from shape_moe.calibration.records import DataOptions
from shape_moe.calibration.sources import Data
from shape_moe.engines import check_engine
from shape_moe.errors import UsageError
from shape_moe.evaluation.faithfulness import FEWEST_RANDOM
from shape_moe.evaluation.footprint import Workload
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.harness import TaskOptions
from shape_moe.evaluation.keep_rate import Limit
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.selection.select import SelectOptions
from shape_moe.selection.selection import Routing

DEFAULT_SAMPLES = 128
"""Records that are used when nothing else is said."""
HELD_OUT_SAMPLES = 400
"""Records to judge by when nothing else is said."""
AUTO = "auto"
"""The scorer that stands for trying several."""
AUTO_HELD_OUT = 64
PAPER_SAMPLES = 25
"""Calibration examples of the published experiments."""


@dataclass(frozen=True)
class ExampleOptions:
    """How a model is traced.

    Attributes:
        data: the calibration set.
        tokens: how its records become tokens.
        answers: what happens to prompts without a response; batch size and limits.
        device: where to run.
        dtype: in which dtype, ``auto`` for the checkpoint's.
        engine: ``transformers`` (every statistic) or ``vllm`` (coalitions and counts; for models of several GPUs).
        engine_args: further arguments of ``vllm.LLM``, such as ``tensor_parallel_size``.

    Raises:
        UsageError: for an unknown engine, and for arguments of one that takes none.
    """

    data: DataOptions
    tokens: TokenOptions = field(default_factory=TokenOptions)
    answers: AnswerOptions = field(default_factory=AnswerOptions)
    device: str = "auto"
    dtype: str = "auto"
    engine: str = "transformers"
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_engine(self.engine, self.engine_args)
        if self.answers.skip_bad and not self.data.skip_bad:
            object.__setattr__(self, "data", replace(self.data, skip_bad=True))

    def job(self) -> dict[str, Any]:
        """What decides the trace, for the job file."""
        return asdict(self)


def as_trace_options(data: ExampleOptions | DataOptions | Data, samples: int) -> ExampleOptions:
    """Trace options from data or data options alone; ``samples`` is for the former."""
    if isinstance(data, ExampleOptions):
        return data
    if isinstance(data, DataOptions):
        return ExampleOptions(data)
    return ExampleOptions(DataOptions.of(data, samples=samples))


@dataclass(frozen=True)
class SelectionJob:
    """How experts are scored and selected.

    Attributes:
        options: keep rate, rule, routing, target and constraints.
        scorer: name of the scorer.
        scoring: segment weights and seed.
    """

    options: SelectOptions
    scorer: str = "shape"
    scoring: ScoreOptions = field(default_factory=ScoreOptions)


def as_selection_job(job: SelectionJob | SelectOptions | float) -> SelectionJob:
    """A selection job from options, or from a keep rate alone."""
    if isinstance(job, SelectionJob):
        return job
    return SelectionJob(job if isinstance(job, SelectOptions) else SelectOptions(keep=job))


@dataclass(frozen=True)
class ChoiceOptions:
    """What is left to the tool.

    Attributes:
        limit: what may be lost; the keep rate is then the smallest that stays within. None keeps the rate asked for.
        rules: rules to try with scorer ``auto``, None for those that the benchmark found good.
        routings: routings to try, None for both with scorer ``auto`` and for the one asked for otherwise.
        held_out: examples to judge by, None for a share of the calibration data.
        held_out_samples: how many, None for 64, with a limit 400.
        generation: how candidates answer freely before one is chosen.
    """

    limit: Limit | None = None
    rules: tuple[str, ...] | None = None
    routings: tuple[Routing, ...] | None = None
    held_out: DataOptions | None = None
    held_out_samples: int | None = None
    generation: GenerationOptions = field(default_factory=GenerationOptions)

    @property
    def samples(self) -> int:
        """How many examples to judge by."""
        if self.held_out_samples is not None:
            return self.held_out_samples
        return HELD_OUT_SAMPLES if self.limit else AUTO_HELD_OUT


@dataclass(frozen=True)
class PruneOptions:
    """What is asked of a pruned checkpoint.

    Attributes:
        select: how experts are chosen; None when a finished selection is given.
        trace: the calibration set and how to trace; None when a trace or a selection is given. Its device and dtype
            are overruled by those below.
        device: where to trace and to compare logits.
        dtype: in which dtype.
        choice: how candidates are judged where scorer or keep rate are left to the tool, None where they are not.
        check_logits: compare the pruned model's logits with the masked original's, where both fit in memory.
        force: replace an existing result, accept artifacts of unknown origin.
    """

    select: SelectionJob | None = None
    trace: ExampleOptions | None = None
    device: str = "auto"
    dtype: str = "auto"
    choice: ChoiceOptions | None = None
    check_logits: bool = True
    force: bool = False


@dataclass(frozen=True)
class EvaluateOptions:
    """What is measured.

    Attributes:
        also: further examples, of what the pruned model was not made for.
        by: field of the records whose classes are judged one by one.
        generation: how models answer freely, None for not at all.
        tasks: tasks of lm-evaluation-harness, None for none.
        footprint: what to time, None to leave memory and speed out.
        faithfulness: how many random selections every selection is compared with, 0 for none.
        trace: trace of selections given as files, and of checkpoints that hold none; faithfulness needs one.
        seed: draws samples, resamples and random selections.
    """

    also: DataOptions | None = None
    by: str | None = None
    generation: GenerationOptions | None = field(default_factory=GenerationOptions)
    tasks: TaskOptions | None = None
    footprint: Workload | None = field(default_factory=Workload)
    faithfulness: int = 0
    trace: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.faithfulness and self.faithfulness < FEWEST_RANDOM:
            raise UsageError(f"Faithfulness needs at least {FEWEST_RANDOM} random selections, not {self.faithfulness}.")
