"""What an experiment works with: models by their headers, and examples on the sides that they stay on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from shape_moe.architectures.fingerprint import fingerprint
from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.calibration.reading import load_records
from shape_moe.calibration.records import Record, content_hash
from shape_moe.calibration.seen_prompts import SeenPrompts
from shape_moe.evaluation.harness import check_chat_template, check_tasks
from shape_moe.experiments.config import ExamplesSpec, ExperimentConfig, ModelSpec, TaskSpec
from shape_moe.jobs.held_out import HELD_OUT_SAMPLES, fresh_records
from shape_moe.jobs.select import check_options
from shape_moe.jobs.session import ExampleOptions, ModelSession
from shape_moe.progress import SILENT
from shape_moe.selection.method import check_for_model
from shape_moe.selection.select import SelectOptions


@dataclass(frozen=True)
class Plan:
    """A grid with everything that it reads.

    Attributes:
        config: the grid.
        snapshots: the models, by name.
        calibration: calibration records by task.
        held_out: records of evaluations by examples, by evaluation; no calibration task of theirs has their prompts.
        left_out: how many records were left out for that, by evaluation.
    """

    config: ExperimentConfig
    snapshots: dict[str, Snapshot]
    calibration: dict[str, list[Record]]
    held_out: dict[str, list[Record]]
    left_out: dict[str, int]

    def job(self) -> dict[str, Any]:
        """What decides the results, by content; files are read when this is called."""
        files = [
            spec.task for spec in self.config.evaluation if isinstance(spec, TaskSpec) and Path(spec.task).is_file()
        ]
        return {
            "verb": "experiment",
            "config": self.config.echo(),
            "models": {name: fingerprint(snapshot) for name, snapshot in self.snapshots.items()},
            **self.hashes,
            "tasks": {file: sha256(Path(file).read_bytes()).hexdigest() for file in files},
        }

    @cached_property
    def hashes(self) -> dict[str, dict[str, str]]:
        """Hashes of the records."""
        return {
            "calibration": {name: content_hash(records) for name, records in self.calibration.items()},
            "held_out": {name: content_hash(records) for name, records in self.held_out.items()},
        }

    def sentence(self, evaluation: str) -> str:
        """How an evaluation's examples were told from those of calibration."""
        seen = self.left_out[evaluation]
        left_out = f" ({seen} records were left out for that)" if seen else ""
        return f"examples whose prompts none of its calibration tasks has{left_out}"


def make_plan(config: ExperimentConfig) -> Plan:
    """Read records and headers, and check everything that needs no weights.

    Raises:
        ShapeMoeError: when a model, a set of examples or a method cannot be used.
    """
    tasks = [spec.task for spec in config.evaluation if isinstance(spec, TaskSpec)]
    if tasks:
        check_tasks(tasks)
    calibration = {spec.name: load_records(spec.tracing.data) for spec in config.calibration}
    held_out: dict[str, list[Record]] = {}
    left_out: dict[str, int] = {}
    for spec in config.evaluation:
        if isinstance(spec, ExamplesSpec):
            seen = SeenPrompts.of_records([r for name in spec.calibration for r in calibration[name]])
            data = spec.tracing.data
            held_out[spec.name], left_out[spec.name] = fresh_records(data, seen, data.samples or HELD_OUT_SAMPLES)
    snapshots = {
        spec.name: open_snapshot(spec.model, spec.revision, trust_remote_code=spec.trust_remote_code)
        for spec in config.models
    }
    plan = Plan(config, snapshots, calibration, held_out, left_out)
    for model in config.models:
        _check_methods(plan, model)
        _check_records(plan, model)
    return plan


def _check_methods(plan: Plan, model: ModelSpec) -> None:
    """Refuse methods that cannot value this model's experts; keep rates that cannot be met are left out later."""
    snapshot = plan.snapshots[model.name]
    for method in plan.config.methods:
        for routing in plan.config.routings:
            routed = method.routed_by(routing)
            check_for_model(routed, snapshot.moe)
            asked = SelectOptions(1.0, routed)
            check_options(asked, snapshot.moe_layers, snapshot.moe.num_experts, snapshot.moe.routing)


def _check_records(plan: Plan, model: ModelSpec) -> None:
    """Tokenise everything once, so that what this model cannot take shows before weights are loaded."""
    config, tokenizer = plan.config, None
    sides = [(spec.tracing, plan.calibration[spec.name]) for spec in config.calibration]
    sides += [(s.tracing, plan.held_out[s.name]) for s in config.evaluation if isinstance(s, ExamplesSpec)]
    for tracing, records in sides:
        options = on_device(tracing, model)
        session = ModelSession.open(plan.snapshots[model.name], options, tokenizer, SILENT, records)
        tokenizer = session.tokenizer
    for spec in config.evaluation:
        if tokenizer is not None and isinstance(spec, TaskSpec):
            check_chat_template(spec.options, tokenizer)


def on_device(tracing: ExampleOptions, model: ModelSpec) -> ExampleOptions:
    """Options with a model's device and dtype."""
    return replace(tracing, device=model.device, dtype=model.dtype)
