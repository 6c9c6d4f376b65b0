"""``shape-moe presets``: benchmarks whose calibration data is known by name."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console

from shape_moe.calibration import presets as known
from shape_moe.cli.console import plain_table
from shape_moe.cli.flags import OutputFlags


def presets(output: OutputFlags) -> None:
    """List the benchmarks that --data preset:NAME reads, with what is read and what to judge by instead.

    Example: shape-moe presets
    """
    document = {name: asdict(preset) for name, preset in known.presets().items()}
    output.output().result(document, _show)


def _show(console: Console) -> None:
    table = plain_table("preset:NAME", "benchmark", "reads", "judge by")
    for column in table.columns[1:]:
        column.justify = "left"
    for name, preset in known.presets().items():
        part = f"{preset.subset}, {preset.split}" if preset.subset else preset.split
        table.add_row(name, preset.title, f"{preset.dataset} ({part})", preset.evaluation)
    console.print(table)
