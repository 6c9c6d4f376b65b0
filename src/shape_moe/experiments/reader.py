"""An experiment's YAML file, checked before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any

from shape_moe.architectures.snapshot import looks_like_path
from shape_moe.calibration.example_maker import AnswerOptions
from shape_moe.calibration.examples import TokenOptions
from shape_moe.calibration.presets import PREFIX, with_base
from shape_moe.calibration.records import DataOptions
from shape_moe.calibration.sources import FILE_TYPES
from shape_moe.embedded_model import EMBEDDED, embedded_model_path
from shape_moe.errors import UsageError
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.experiments.config import (
    CalibrationSpec,
    EvaluationSpec,
    ExamplesSpec,
    ExperimentConfig,
    ModelSpec,
    PublishedFigures,
    SeededMethod,
    TaskSpec,
)
from shape_moe.experiments.yaml_section import YamlSection, read_yaml
from shape_moe.jobs.held_out import HELD_OUT_SAMPLES
from shape_moe.jobs.session import DEFAULT_SAMPLES, ExampleOptions
from shape_moe.literal_paths import expand_home
from shape_moe.reporting.experiment_metrics import EXAMPLE_METRICS, GENERATED
from shape_moe.reporting.published_figures import DENSE
from shape_moe.scoring.registry import get_scorer
from shape_moe.selection.method import Method, read_routed
from shape_moe.selection.rules import check_by_priority
from shape_moe.selection.select import SelectOptions
from shape_moe.tracing.token_weights import token_weights
from shape_moe.units import share_from

_RANDOM = "random"


def read_config(file: str | PathLike[str]) -> ExperimentConfig:
    """Read and check an experiment's file; relative paths in it are relative to it.

    Raises:
        UsageError: naming the key that is wrong.
    """
    top = read_yaml(Path(file))
    return _Reader(top, Path(file).resolve().parent).config()


@dataclass(frozen=True)
class _Grid:
    """What the file says at its top, but for the sections of its parts."""

    models: list[Any]
    keep: list[float]
    scorers: list[str] | None = None
    rules: list[str] | None = None
    methods: list[str] | None = None
    routings: list[str] = field(default_factory=lambda: ["drop"])
    random_seeds: list[int] | None = None
    seed: int = 0
    prompt_weight: float | None = None
    response_weight: float | None = None
    predicting_weight: float | None = None
    other_weight: float | None = None
    pool_classes: bool = False
    output: str | None = None


@dataclass(frozen=True)
class _Judged:
    """What the file says of an evaluation by examples, but for the examples."""

    metrics: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    generate: int | None = None
    answer_tokens: int | None = None
    answer_pattern: str | None = None


def _rate(given: Any) -> Any:
    """A keep rate written as a percentage as its number; whatever else it is, as it is."""
    share = share_from(given) if isinstance(given, str) else None
    return given if share is None else share


def _model_entry(entry: Any) -> dict[str, Any]:
    return entry if isinstance(entry, dict) else {"model": entry}


def _last(entry: Any) -> str:
    """What a model is called where its entry gives no name."""
    return str(_model_entry(entry).get("model")).rstrip("/").rsplit("/", 1)[-1]


def _keep_of(text: str, where: str) -> str:
    """A keep rate, written as a percentage or a share, in the one spelling of results."""
    share = share_from(text)
    try:
        rate = float(text) if share is None else share
    except ValueError as error:
        raise UsageError(f"{where}: {text!r} is not a keep rate; write 80%.") from error
    return f"{rate:g}"


class _Reader:
    """Turns the file's sections into specs."""

    def __init__(self, top: YamlSection, base: Path) -> None:
        self.top, self.base = top, base
        if isinstance(rates := top.content.get("keep"), list):
            top.content["keep"] = [_rate(rate) for rate in rates]
        self.grid = top.take(_Grid)

    def config(self) -> ExperimentConfig:
        top, grid = self.top, self.grid
        models = tuple(self._model(entry, place) for place, entry in enumerate(grid.models, start=1))
        names = [spec.name for spec in models]
        if again := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"{top.where('models')}: two of them are called {again[0]!r}; give one another name.")
        calibration = tuple(self._calibration(name, part) for name, part in top.parts("calibration"))
        known = tuple(spec.name for spec in calibration)
        evaluation = tuple(self._evaluation(name, part, known) for name, part in top.parts("evaluation"))
        judged = {name for spec in evaluation for name in spec.calibration}
        if unused := [name for name in known if name not in judged]:
            raise UsageError(f"{top.where('calibration')}.{unused[0]} is judged by none of the evaluations.")
        top.done()
        with top.naming("keep"):
            for rate in grid.keep:
                SelectOptions(rate)
        with top.naming("routings"):
            routings = tuple(
                Method(routing=name, gate_scale=scale).routed for name, scale in map(read_routed, grid.routings)
            )
        with top.naming():
            weights = token_weights(
                {
                    "prompt": grid.prompt_weight,
                    "response": grid.response_weight,
                    "predicting": grid.predicting_weight,
                    "other": grid.other_weight,
                }
            )
        return ExperimentConfig(
            models=models,
            calibration=calibration,
            methods=self._methods(),
            routings=routings,
            keep=tuple(grid.keep),
            evaluation=evaluation,
            seed=grid.seed,
            weights=weights,
            pool_classes=grid.pool_classes,
            output=None if grid.output is None else str(self.base / grid.output),
        )

    def _model(self, entry: Any, place: int) -> ModelSpec:
        part = YamlSection(
            {"model": entry} if isinstance(entry, str) else entry, self.top.file, f"models, entry {place}"
        )
        default: dict[str, Any] = {} if "name" in part.content else {"name": _last(part.content)}
        spec = part.take(ModelSpec, **default)
        self._check_name(spec.name, part)
        part.done()
        return replace(spec, model=self._place_of(spec.model))

    def _place_of(self, model: str) -> str:
        """The embedded model, a folder beside the file, or a hub id."""
        if model == EMBEDDED:
            return str(embedded_model_path())
        folder = (self.base / expand_home(model)).resolve()
        if folder.exists():
            return str(folder)
        if looks_like_path(model):
            raise UsageError(f"{self.top.where('models')}: there is no folder {folder}.")
        return model

    def _calibration(self, name: str, part: YamlSection) -> CalibrationSpec:
        self._check_name(name, part)
        spec = CalibrationSpec(name, self._tracing(part, DEFAULT_SAMPLES))
        part.done()
        return spec

    def _tracing(self, part: YamlSection, samples: int) -> ExampleOptions:
        data = part.take(DataOptions, {"source": "data", "fields": "map"}, seed=self.grid.seed)
        also = tuple(self._source(source, part) for source in data.also)
        data = replace(data, source=self._source(data.source, part), also=also, samples=data.samples or samples)
        return ExampleOptions(data, part.take(TokenOptions), part.take(AnswerOptions))

    def _source(self, source: str, part: YamlSection) -> str:
        """A file, folder or local copy beside the configuration; a preset or a dataset's name as it is."""
        if source.startswith(PREFIX):
            return with_base(source, self.base)
        path = (self.base / expand_home(source)).resolve()
        if path.exists():
            return str(path)
        if path.suffix.lower() in FILE_TYPES or looks_like_path(source):
            raise UsageError(f"{part.where('data')}: there is no file {path}.")
        return source

    def _evaluation(self, name: str, part: YamlSection, known: tuple[str, ...]) -> EvaluationSpec:
        self._check_name(name, part)
        if ("data" in part.content) == ("task" in part.content):
            raise UsageError(f"{part.where()} needs either data (examples) or task (of lm-evaluation-harness).")
        published = self._published(part) if "published" in part.content else None
        spec = self._examples(name, part) if "data" in part.content else self._task(name, part)
        if published is not None and spec.metrics and published.metric not in spec.metrics:
            raise UsageError(f"{part.where('published.metric')}: {published.metric!r} is not among the metrics.")
        part.done()
        if unknown := [entry for entry in spec.calibration if entry not in known]:
            raise UsageError(f"{part.where('calibration')}: there is no calibration task {unknown[0]!r}.")
        return replace(spec, calibration=spec.calibration or known, published=published)

    def _published(self, part: YamlSection) -> PublishedFigures:
        """What others have published: of models, methods and keep rates of this grid, in percent."""
        section = part.nested("published")
        spec = section.take(PublishedFigures)
        section.done()
        with section.naming("routing"):
            routing = Method(routing=read_routed(spec.routing)[0], gate_scale=read_routed(spec.routing)[1]).routed
        models = {str(_model_entry(entry).get("name") or _last(entry)) for entry in self.grid.models}
        percent: dict[str, dict[str, float | dict[str, float]]] = {}
        for model, methods in spec.percent.items():
            if model not in models:
                raise UsageError(f"{section.where('percent')}: there is no model {model!r} in the grid.")
            percent[model] = {}
            for name, given in methods.items():
                where = section.where(f"percent.{model}.{name}")
                by_keep = (
                    {_keep_of(keep, where): value for keep, value in given.items()}
                    if isinstance(given, dict)
                    else given
                )
                if isinstance(by_keep, dict) == (name == DENSE):
                    raise UsageError(
                        f"{where}: a method's figures are given by keep rate, the dense model's as a number."
                    )
                if not all(
                    0 <= value <= 100 for value in (by_keep.values() if isinstance(by_keep, dict) else [by_keep])
                ):
                    raise UsageError(f"{where}: figures are given in percent.")
                if name != DENSE:
                    with section.naming(f"percent.{model}.{name}"):
                        Method.parse(name)
                percent[model][name] = by_keep
        return replace(spec, percent=percent, routing=routing)

    def _examples(self, name: str, part: YamlSection) -> ExamplesSpec:
        found = part.take(_Judged)
        usual = GenerationOptions.examples if found.answer_pattern is not None else 0
        count = usual if found.generate is None else found.generate
        with part.naming():
            generation = GenerationOptions(count, found.answer_tokens, found.answer_pattern) if count else None
        metrics = found.metrics or (GENERATED if generation else "exact_match", "nll", "kl")
        if unknown := [metric for metric in metrics if metric not in EXAMPLE_METRICS]:
            known = ", ".join(EXAMPLE_METRICS)
            raise UsageError(f"{part.where('metrics')}: there is no figure {unknown[0]!r}; there are {known}.")
        if GENERATED in metrics and generation is None:
            raise UsageError(f"{part.where('metrics')}: {GENERATED} needs generate, the number of free answers.")
        return ExamplesSpec(name, self._tracing(part, HELD_OUT_SAMPLES), generation, metrics, found.calibration)

    def _task(self, name: str, part: YamlSection) -> TaskSpec:
        spec = part.take(TaskSpec, name=name, published=None)
        if not spec.task.endswith((".yaml", ".yml")):
            return spec
        file = (self.base / expand_home(spec.task)).resolve()
        if not file.is_file():
            raise UsageError(f"{part.where('task')}: there is no file {file}.")
        return replace(spec, task=str(file))

    def _methods(self) -> tuple[SeededMethod, ...]:
        top, grid = self.top, self.grid
        if grid.methods and (grid.scorers or grid.rules):
            raise UsageError(f"{top.where('methods')} stands for scorers and rules; give either.")
        pairs = list(product(grid.scorers or ("shape",), grid.rules or ("coverage",)))
        if grid.methods:
            pairs = [self._pair(text) for text in grid.methods]
        if grid.random_seeds is not None and _RANDOM not in {scorer for scorer, _ in pairs}:
            raise UsageError(f"{top.where('random_seeds')} needs scorer random, which is not among the methods.")
        for scorer, rule in pairs:
            with top.naming("methods" if grid.methods else "scorers"):
                get_scorer(scorer)
            with top.naming("methods" if grid.methods else "rules"):
                check_by_priority(rule)
        seeds = grid.random_seeds or (grid.seed,)
        return tuple(
            SeededMethod(scorer, rule, seed=seed)
            for scorer, rule in pairs
            for seed in (seeds if scorer == _RANDOM else (None,))
        )

    def _pair(self, text: str) -> tuple[str, str]:
        with self.top.naming("methods"):
            method = Method.parse(text)
        if "," in text:
            raise UsageError(f"{self.top.where('methods')}: write {method.pair}; routings and target say the rest.")
        return method.scorer, method.rule

    def _check_name(self, name: str, part: YamlSection) -> None:
        """Names become folders."""
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UsageError(
                f"{part.where()}: {name!r} cannot be a name; use letters, digits, dots, dashes and underscores."
            )
