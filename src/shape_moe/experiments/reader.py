"""An experiment's YAML file, checked before anything is loaded."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Any

from shape_moe.architectures.embedded import EMBEDDED, embedded_model_path
from shape_moe.architectures.snapshot import looks_like_path
from shape_moe.calibration.example_maker import AnswerOptions
from shape_moe.calibration.examples import TokenOptions
from shape_moe.calibration.presets import PREFIX, with_base
from shape_moe.calibration.records import DataOptions
from shape_moe.calibration.sources import FILE_TYPES
from shape_moe.errors import UsageError
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.experiments.config import (
    CalibrationSpec,
    EvaluationSpec,
    ExamplesSpec,
    ExperimentConfig,
    ModelSpec,
    SeededMethod,
    TaskSpec,
)
from shape_moe.experiments.yaml_section import Section, read_yaml
from shape_moe.jobs.held_out import HELD_OUT_SAMPLES
from shape_moe.jobs.session import DEFAULT_SAMPLES, ExampleOptions
from shape_moe.literal_paths import expand_home
from shape_moe.reporting.experiment_tables import EXAMPLE_METRICS, GENERATED
from shape_moe.scoring.registry import get_scorer
from shape_moe.selection.method import ROUTINGS, Routing
from shape_moe.selection.rules import get_rule
from shape_moe.selection.select import SelectOptions
from shape_moe.tracing.trace import SegmentWeights

_RANDOM = "random"


def read_config(file: str | PathLike[str]) -> ExperimentConfig:
    """Read and check an experiment's file; relative paths in it are relative to it.

    Raises:
        UsageError: naming the key that is wrong.
    """
    top = read_yaml(Path(file))
    return _Reader(top, Path(file).resolve().parent).config()


class _Reader:
    """Turns the file's sections into specs."""

    def __init__(self, top: Section, base: Path) -> None:
        self.top, self.base = top, base
        self.seed = top.one("seed", int, 0)

    def config(self) -> ExperimentConfig:
        top = self.top
        models = tuple(self._model(entry, place) for place, entry in enumerate(top.some("models", object), start=1))
        self._check_different("models", [spec.name for spec in models])
        calibration = tuple(self._calibration(name, part) for name, part in top.parts("calibration"))
        known = tuple(spec.name for spec in calibration)
        evaluation = tuple(self._evaluation(name, part, known) for name, part in top.parts("evaluation"))
        judged = {name for spec in evaluation for name in spec.calibration}
        if unused := [name for name in known if name not in judged]:
            raise UsageError(f"{top.where('calibration')}.{unused[0]} is judged by none of the evaluations.")
        output = top.one("output", str, None)
        config = ExperimentConfig(
            models=models,
            calibration=calibration,
            methods=self._methods(),
            routings=self._routings(),
            keep=self._keep(),
            evaluation=evaluation,
            seed=self.seed,
            weights=self._weights(),
            output=None if output is None else str(self.base / output),
        )
        top.done()
        return config

    def _weights(self) -> SegmentWeights:
        with self.top.naming():
            return SegmentWeights(
                self.top.one("prompt_weight", float, 1.0), self.top.one("response_weight", float, 1.0)
            )

    def _model(self, entry: Any, place: int) -> ModelSpec:
        path = f"models, entry {place}"
        part = Section({"model": entry} if isinstance(entry, str) else entry, self.top.file, path)
        given = part.one("model", str)
        name = part.one("name", str, given.rstrip("/").rsplit("/", 1)[-1])
        self._check_name(name, part)
        spec = ModelSpec(name, self._place_of(given), part.one("device", str, "auto"), part.one("dtype", str, "auto"))
        part.done()
        return spec

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

    def _calibration(self, name: str, part: Section) -> CalibrationSpec:
        self._check_name(name, part)
        spec = CalibrationSpec(name, self._tracing(part, DEFAULT_SAMPLES))
        part.done()
        return spec

    def _tracing(self, part: Section, samples: int) -> ExampleOptions:
        fields = part.mapping("map")
        if wrong := [key for key, value in fields.items() if not isinstance(value, str)]:
            raise UsageError(f"{part.where('map')}.{wrong[0]} must name a field.")
        with part.naming():
            data = DataOptions(
                source=self._source(part),
                split=part.one("split", str, None),
                subset=part.one("subset", str, None),
                fields={key: str(value) for key, value in fields.items()} or None,
                samples=part.one("samples", int, samples),
                stratify=part.one("stratify", str, None),
                seed=self.seed,
            )
            tokens = TokenOptions(
                template=part.one("template", bool, True),
                template_args=dict(part.mapping("template_args")),
                max_length=part.one("max_length", int, None),
            )
            answers = AnswerOptions(
                max_new_tokens=part.one("max_new_tokens", int, AnswerOptions.max_new_tokens),
                responses_from=part.one("responses_from", str, None),
                batch_size=part.one("batch_size", int, AnswerOptions.batch_size),
                max_tokens=part.one("max_tokens", int, AnswerOptions.max_tokens),
                skip_bad=part.one("skip_bad", bool, False),
            )
        return ExampleOptions(data, tokens, answers)

    def _source(self, part: Section) -> str:
        """A file, folder or local copy beside the configuration; a preset or a dataset's name as it is."""
        source = part.one("data", str)
        if source.startswith(PREFIX):
            return with_base(source, self.base)
        path = (self.base / expand_home(source)).resolve()
        if path.exists():
            return str(path)
        if path.suffix.lower() in FILE_TYPES or looks_like_path(source):
            raise UsageError(f"{part.where('data')}: there is no file {path}.")
        return source

    def _evaluation(self, name: str, part: Section, known: tuple[str, ...]) -> EvaluationSpec:
        self._check_name(name, part)
        if part.has("data") == part.has("task"):
            raise UsageError(f"{part.where()} needs either data (examples) or task (of lm-evaluation-harness).")
        calibration = part.some("calibration", str, known)
        if unknown := [entry for entry in calibration if entry not in known]:
            raise UsageError(f"{part.where('calibration')}: there is no calibration task {unknown[0]!r}.")
        spec = self._examples(name, part, calibration) if part.has("data") else self._task(name, part, calibration)
        part.done()
        return spec

    def _examples(self, name: str, part: Section, calibration: tuple[str, ...]) -> ExamplesSpec:
        pattern = part.one("answer_pattern", str, None)
        count = part.one("generate", int, GenerationOptions.examples if pattern is not None else 0)
        longest = part.one("answer_tokens", int, None)
        with part.naming():
            generation = GenerationOptions(count, longest, pattern) if count else None
        metrics = part.some("metrics", str, (GENERATED if generation else "exact_match", "nll", "kl"))
        for metric in metrics:
            if metric not in EXAMPLE_METRICS:
                raise UsageError(
                    f"{part.where('metrics')}: there is no figure {metric!r}; there are {', '.join(EXAMPLE_METRICS)}."
                )
        if GENERATED in metrics and generation is None:
            raise UsageError(f"{part.where('metrics')}: {GENERATED} needs generate, the number of free answers.")
        return ExamplesSpec(name, self._tracing(part, HELD_OUT_SAMPLES), generation, metrics, calibration)

    def _task(self, name: str, part: Section, calibration: tuple[str, ...]) -> TaskSpec:
        task = part.one("task", str)
        if task.endswith((".yaml", ".yml")):
            file = (self.base / expand_home(task)).resolve()
            if not file.is_file():
                raise UsageError(f"{part.where('task')}: there is no file {file}.")
            task = str(file)
        for key, least in (("limit", 1), ("fewshot", 0), ("batch_size", 1)):
            if (value := part.one(key, int, None)) is not None and value < least:
                raise UsageError(f"{part.where(key)} must be at least {least}, not {value}.")
        return TaskSpec(
            name=name,
            task=task,
            limit=part.one("limit", int, None),
            fewshot=part.one("fewshot", int, None),
            batch_size=part.one("batch_size", int, 8),
            chat_template=part.one("chat_template", bool, False),
            unsafe_code=part.one("unsafe_code", bool, False),
            metrics=part.some("metrics", str, ()),
            calibration=calibration,
        )

    def _methods(self) -> tuple[SeededMethod, ...]:
        top = self.top
        if top.has("methods") and (top.has("scorers") or top.has("rules")):
            raise UsageError(f"{top.where('methods')} stands for scorers and rules; give either.")
        if top.has("methods"):
            pairs = [self._pair(text) for text in top.some("methods", str)]
        else:
            pairs = [
                (scorer, rule)
                for scorer in top.some("scorers", str, ("shape",))
                for rule in top.some("rules", str, ("coverage",))
            ]
        seeds = top.some("random_seeds", int, None)
        if seeds is not None and _RANDOM not in {scorer for scorer, _ in pairs}:
            raise UsageError(f"{top.where('random_seeds')} goes with scorer random, which is not among the methods.")
        key = "methods" if top.has("methods") else "scorers"
        with top.naming(key):
            for scorer, _ in pairs:
                get_scorer(scorer)
        with top.naming("methods" if top.has("methods") else "rules"):
            for _, rule in pairs:
                get_rule(rule)
        found = []
        for scorer, rule in pairs:
            drawn = (seeds or (self.seed,)) if scorer == _RANDOM else (None,)
            found += [SeededMethod(scorer, rule, seed=seed) for seed in drawn]
        return tuple(found)

    def _pair(self, text: str) -> tuple[str, str]:
        scorer, slash, rule = text.partition("/")
        if not (scorer and slash and rule):
            raise UsageError(f"{self.top.where('methods')}: {text!r} is not SCORER/RULE, as shape/coverage.")
        return scorer, rule

    def _routings(self) -> tuple[Routing, ...]:
        routings = self.top.some("routings", str, ("drop",))
        for routing in routings:
            if routing not in ROUTINGS:
                names = ", ".join(ROUTINGS)
                raise UsageError(f"{self.top.where('routings')}: there is no routing {routing!r}; there are {names}.")
        return tuple(routing for known in routings for routing in ROUTINGS if routing == known)

    def _keep(self) -> tuple[float, ...]:
        rates = self.top.some("keep", float)
        with self.top.naming("keep"):
            for rate in rates:
                SelectOptions(rate)
        return rates

    def _check_name(self, name: str, part: Section) -> None:
        """Names become folders."""
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UsageError(f"{part.where()}: {name!r} is no name; use letters, digits, dots, dashes and underscores.")

    def _check_different(self, key: str, names: list[str]) -> None:
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"{self.top.where(key)}: two of them are called {name!r}; give one another name.")
