"""What an experiment is: a grid of models, calibration tasks, methods, routings, keep rates and evaluations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

from msgspec import Meta

from shape_moe.errors import UsageError, one_of
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.harness import TaskOptions
from shape_moe.jobs.session import ExampleOptions
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.selection.method import Method, read_routed
from shape_moe.tracing.token_weights import TokenWeights


@dataclass(frozen=True)
class ModelSpec:
    """A model: its name in results, and where (with its revision on the hub) and how it is loaded."""

    name: str
    model: str
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class CalibrationSpec:
    """A calibration task; device and dtype of its options are the model's."""

    name: str
    tracing: ExampleOptions


@dataclass(frozen=True)
class PublishedFigures:
    """What others have published for an evaluation, to be held against its figures.

    Attributes:
        metric: key of the figure that corresponds to theirs.
        percent: by model of the grid, and by method (``scorer/rule``, or ``dense``): percent, by keep rate where it is
            not the dense model's.
        source: where it was published.
        differences: how their stack is known to differ from this one.
        routing: how they routed.
    """

    metric: str
    percent: dict[str, dict[str, float | dict[str, float]]]
    source: str = ""
    differences: tuple[str, ...] = ()
    routing: str = "drop"


@dataclass(frozen=True)
class ExamplesSpec:
    """An evaluation by held-out examples.

    Attributes:
        name: its name.
        tracing: the examples, and how they become tokens.
        generation: how models answer freely, None for not at all.
        metrics: the figures that tables show.
        calibration: the calibration tasks whose selections are judged by it.
        published: figures of others to hold against its own, None without any.
    """

    name: str
    tracing: ExampleOptions
    generation: GenerationOptions | None
    metrics: tuple[str, ...]
    calibration: tuple[str, ...]
    published: PublishedFigures | None = None


@dataclass(frozen=True)
class TaskSpec:
    """An evaluation by a task of lm-evaluation-harness.

    Attributes:
        name: its name.
        task: the task's name, or the path of a YAML file that defines it.
        limit: the first items only, None for all.
        fewshot: examples in the prompt, None for the task's own number.
        batch_size: requests per forward pass.
        chat_template: put prompts through the tokenizer's chat template.
        unsafe_code: run code that the model writes.
        metrics: the task's metrics that tables show, empty for all.
        calibration: the calibration tasks whose selections are judged by it.
        published: figures of others to hold against its own, None without any.
    """

    name: str
    task: str
    limit: Annotated[int, Meta(ge=1)] | None = None
    fewshot: Annotated[int, Meta(ge=0)] | None = None
    batch_size: Annotated[int, Meta(ge=1)] = 8
    chat_template: bool = False
    unsafe_code: bool = False
    metrics: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    published: PublishedFigures | None = None

    @property
    def options(self) -> TaskOptions:
        """The task as lm-eval is asked for it."""
        return TaskOptions((self.task,), self.limit, self.fewshot, self.chat_template, self.unsafe_code)


EvaluationSpec = ExamplesSpec | TaskSpec
ENGINES = ("transformers", "vllm")
"""What selections can be judged in."""


@dataclass(frozen=True)
class SeededMethod(Method):
    """A method of the grid, whose routings are an axis of their own.

    Attributes:
        seed: that of scorer random, None for all others.
    """

    seed: int | None = None

    def routed_by(self, routing: str) -> SeededMethod:
        """The same, routed as an entry of the grid's routings says."""
        name, scale = read_routed(routing)
        return replace(self, routing=name, gate_scale=scale)


@dataclass(frozen=True)
class ExperimentConfig:
    """The grid: every model with every calibration task, method, routing and keep rate, judged by every evaluation.

    Attributes:
        models: the models.
        calibration: what selections are made from.
        methods: scorers with rules; scorer random once per seed.
        routings: ``drop``, ``reroute``, ``reroute, trained`` or several of them.
        keep: keep rates.
        evaluation: what selections are judged by.
        seed: draws samples and resamples.
        weights: how much tokens count in scores; None leaves it to the scorers.
        pool_classes: whether classes of the calibration data are added up instead of joined by their maximum.
        output: the folder for results, None where the file names none.
        engine: what selections are judged in: ``transformers``, or ``vllm`` for free answers alone.
        engine_args: arguments of ``vllm.LLM``.
    """

    models: tuple[ModelSpec, ...]
    calibration: tuple[CalibrationSpec, ...]
    methods: tuple[SeededMethod, ...]
    routings: tuple[str, ...]
    keep: tuple[float, ...]
    evaluation: tuple[EvaluationSpec, ...]
    seed: int = 0
    weights: TokenWeights | None = None
    pool_classes: bool = False
    output: str | None = None
    engine: str = "transformers"
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of(self.engine, ENGINES, "The engine")
        if self.engine_args and self.engine != "vllm":
            raise UsageError("Engine arguments go with --engine vllm.")
        silent = [spec.name for spec in self.evaluation if not (isinstance(spec, ExamplesSpec) and spec.generation)]
        if self.engine == "vllm" and silent:
            raise UsageError(
                f"--engine vllm judges by free answers, and evaluation {silent[0]} has none (data with generate): "
                "name others by --only evaluation=NAME, or leave --engine out."
            )

    @property
    def selections(self) -> int:
        """How many selections the grid has."""
        return len(self.models) * len(self.calibration) * self._per_calibration

    @property
    def cells(self) -> int:
        """How many times a selection is judged by an evaluation."""
        return len(self.models) * self._per_calibration * sum(len(spec.calibration) for spec in self.evaluation)

    @property
    def _per_calibration(self) -> int:
        return len(self.methods) * len(self.routings) * len(self.keep)

    def scoring(self, method: SeededMethod) -> ScoreOptions:
        """How a method's scorer is run."""
        seed = self.seed if method.seed is None else method.seed
        return ScoreOptions(self.weights, seed, pool_classes=self.pool_classes)

    def echo(self) -> dict[str, Any]:
        """Everything that decides the results, for JSON."""
        content = asdict(self)
        del content["output"]
        return content

    def only(self, **wanted: Collection[str]) -> ExperimentConfig:
        """A part of the grid.

        Args:
            wanted: names to keep, by ``model``, ``calibration``, ``method``, ``routing``, ``keep`` and ``evaluation``.

        Raises:
            UsageError: for a name that the grid does not have, and when nothing is left to judge.
        """
        axes: dict[str, tuple[str, list[str]]] = {
            "model": ("models", [spec.name for spec in self.models]),
            "calibration": ("calibration", [spec.name for spec in self.calibration]),
            "method": ("methods", [method.pair for method in self.methods]),
            "routing": ("routings", [str(routing) for routing in self.routings]),
            "keep": ("keep", [f"{keep:g}" for keep in self.keep]),
            "evaluation": ("evaluation", [spec.name for spec in self.evaluation]),
        }
        changes: dict[str, Any] = {}
        for axis, names in wanted.items():
            if axis not in axes:
                raise UsageError(f"The grid has no {axis!r}; choose from {', '.join(axes)}.")
            attribute, known = axes[axis]
            unknown = [name for name in names if name not in known]
            if unknown:
                raise UsageError(f"The grid has no {axis} {unknown[0]!r}; it has {', '.join(dict.fromkeys(known))}.")
            changes[attribute] = tuple(
                entry for entry, name in zip(getattr(self, attribute), known, strict=True) if name in names
            )
        return _without_unused(replace(self, **changes))


def _without_unused(grid: ExperimentConfig) -> ExperimentConfig:
    """The grid without evaluations that no calibration task is left for, and the other way round."""
    left = {spec.name for spec in grid.calibration}
    evaluation = [
        replace(spec, calibration=tuple(name for name in spec.calibration if name in left)) for spec in grid.evaluation
    ]
    judged = tuple(spec for spec in evaluation if spec.calibration)
    used = {name for spec in judged for name in spec.calibration}
    if not judged:
        raise UsageError("Nothing is left: none of the evaluations judges these calibration tasks.")
    return replace(grid, evaluation=judged, calibration=tuple(spec for spec in grid.calibration if spec.name in used))
