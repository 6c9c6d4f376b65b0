"""Run a grid of pruning experiments: one trace per model and task, every selection judged as a mask."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from shape_moe.errors import UsageError
from shape_moe.experiments.config import ExamplesSpec, ExperimentConfig
from shape_moe.experiments.grid import ANSWERS_FOLDER, CELLS_FILE, Grid
from shape_moe.experiments.plan import make_plan
from shape_moe.experiments.reader import read_config
from shape_moe.progress import SILENT, Progress
from shape_moe.reporting.experiment_tables import experiment_markdown
from shape_moe.workspace import Workspace, write_json, write_text


@dataclass(frozen=True)
class ExperimentResult:
    """An experiment's answer.

    Attributes:
        document: the content of ``experiment.json``.
        markdown: the content of ``experiment.md``.
        folder: where both lie, with traces and selections.
    """

    document: dict[str, Any]
    markdown: str
    folder: Path


def experiment(
    config: ExperimentConfig | str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> ExperimentResult:
    """Run every cell of a grid; an interrupted run with the same configuration resumes after its last cell.

    Args:
        config: a YAML file, or what :func:`shape_moe.experiments.reader.read_config` made of one.
        out: folder for the results; None for the one that the configuration names.
        force: replace an earlier result.
        progress: where to show progress.

    Raises:
        ShapeMoeError: when something is wrong; the message says what to do.
    """
    inputs: list[str | PathLike[str]] = []
    if not isinstance(config, ExperimentConfig):
        inputs.append(config)
        config = read_config(config)
    folder = out if out is not None else config.output
    if folder is None:
        raise UsageError("The experiment names no output: add the key output, or give -o DIR.")
    inputs += [spec.model for spec in config.models]
    inputs += [spec.tracing.data.source for spec in config.calibration]
    inputs += [spec.tracing.data.source for spec in config.evaluation if isinstance(spec, ExamplesSpec)]
    plan = make_plan(config)
    inputs += [snapshot.path for snapshot in plan.snapshots.values()]
    with Workspace(folder, plan.job(), force=force, inputs=inputs) as work:
        document = Grid(plan, work.digest, work.path, progress).run()
        markdown = experiment_markdown(document)
        write_json(work.path / "experiment.json", document)
        write_text(work.path / "experiment.md", markdown)
        _remove_unfinished(work.path)
        return ExperimentResult(document, markdown, work.complete())


def _remove_unfinished(folder: Path) -> None:
    (folder / CELLS_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / ANSWERS_FOLDER, ignore_errors=True)
