"""``shape-moe families``: which model families are known."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console
from rich.markup import escape

from shape_moe.cli.console import plain_table
from shape_moe.cli.flags import OutputFlags
from shape_moe.jobs.families import families as known


def families(output: OutputFlags) -> None:
    """List the model families that are known, and what is supported of each.

    Example: shape-moe families
    """
    output.output().result({"families": [asdict(support) for support in known()]}, _show)


def _show(console: Console) -> None:
    table = plain_table("family", "grade", "vLLM, ragged", "GGUF", "remarks")
    for column in table.columns[1:]:
        column.justify = "left"
    for found in known():
        served, file = ("yes" if supported else "" for supported in (found.vllm, found.gguf))
        table.add_row(found.model_type, found.grade, served, file, escape(" ".join(found.remarks)))
    console.print(table)
