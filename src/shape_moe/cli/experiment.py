"""``shape-moe experiment``: a grid of pruning experiments from one file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import shape_moe
from shape_moe.cli.console import plain_table, show_commands
from shape_moe.cli.flags import ForceFlag, OutputFlags
from shape_moe.cli.values import parse_values
from shape_moe.errors import UsageError
from shape_moe.experiments.config import ExperimentConfig
from shape_moe.experiments.reader import read_config
from shape_moe.reporting.experiment_tables import STARRED, experiment_gaps, experiment_parts, experiment_preface
from shape_moe.units import share_from


def experiment(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file that describes the grid.")],
    force: ForceFlag,
    output: OutputFlags,
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the results. Default: what CONFIG names."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AXIS=NAME",
            help="A part of the grid: model, calibration, method, routing, keep or evaluation; can be repeated.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="What selections are judged in: transformers (the default), or vllm, which holds the dense model "
            "once, takes selections as masks, and judges free answers alone."
        ),
    ] = None,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="With --engine vllm: an argument of vllm.LLM, for example tensor_parallel_size=2.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check CONFIG and count its cells; nothing is read or loaded.")
    ] = False,
) -> None:
    """Run models x calibration tasks x methods x routings x keep rates x evaluations.

    An interrupted run is resumed by the same command.

    Example: shape-moe experiment examples/tiny/tiny.yaml -o results/tiny
    """
    talk = output.output()
    grid = read_config(config).only(**_axes(only or []))
    if engine is not None or engine_arg:
        arguments = parse_values(engine_arg, "--engine-arg")
        grid = replace(grid, engine=engine or grid.engine, engine_args=arguments)
    if dry_run:
        talk.result(_size(grid), lambda console: _show_size(console, grid))
        return
    result = shape_moe.experiment(grid, out, force=force.force, progress=talk)
    talk.note(f"Wrote {result.folder}")
    talk.result(result.document, lambda console: _show(console, result.document, result.folder))


def _show(console: Console, document: Mapping[str, Any], folder: Path) -> None:
    """The tables, then what is best at which size."""
    console.print(f"{experiment_preface(document)}\n{STARRED}", markup=False)
    for part in experiment_parts(document):
        console.print()
        console.print(f"[bold]{escape(part.model)}: {escape(part.evaluation)}[/bold]")
        console.print(f"{part.sizes}\n{part.sample}", markup=False)
        for shown in part.tables:
            console.print()
            table = plain_table(*shown.headings, title=shown.title)
            for name, *cells in shown.rows:
                table.add_row(name, *(cell.marked for cell in cells))
            console.print(table)
    if reasons := experiment_gaps(document):
        console.print()
        for reason in reasons:
            console.print(f"Not possible: {reason}", markup=False)
    console.print()
    show_commands(console, [f"shape-moe report {shlex.quote(str(folder))} -o report.html"])


def _axes(given: list[str]) -> dict[str, list[str]]:
    axes: dict[str, list[str]] = {}
    for text in given:
        axis, equals, name = text.partition("=")
        if not equals or not name:
            raise UsageError(f"--only takes AXIS=NAME, such as model=gpt-oss-20b, not {text!r}.")
        share = share_from(name) if axis == "keep" else None
        axes.setdefault(axis, []).append(name if share is None else f"{share:g}")
    return axes


def _size(grid: ExperimentConfig) -> dict[str, int]:
    return {
        "models": len(grid.models),
        "traces": len(grid.models) * len(grid.calibration),
        "selections": grid.selections,
        "cells": grid.cells,
    }


def _show_size(console: Console, grid: ExperimentConfig) -> None:
    parts = ", ".join(f"{count} {name}" for name, count in _size(grid).items())
    console.print(f"{parts} (a cell is a selection judged by an evaluation)")
