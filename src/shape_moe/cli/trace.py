"""``shape-moe trace``: one calibration pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import shape_moe
from shape_moe.cli.data_flags import DataFlags, KeepAlsoFlag
from shape_moe.cli.flags import (
    RUN_PANEL,
    ForceFlag,
    LoadFlags,
    ModelArgument,
    OutputFlags,
    RevisionFlag,
    SeedFlag,
    StreamFlag,
)
from shape_moe.cli.values import parse_values
from shape_moe.jobs.session import DEFAULT_SAMPLES
from shape_moe.progress import SILENT
from shape_moe.tracing.ranks import Ranks
from shape_moe.tracing.trace import Trace

HELPS = {"samples": f"Use at most this many records. Default: {DEFAULT_SAMPLES}."}
FIRST = {
    "out": "",
    "data": "Your examples: file, folder or data set.",
    "samples": "",
    "data_format": "The records' shape, if not recognised.",
    "field_map": "Your names of fields: prompt=question.",
    "max_new_tokens": "Longest answer to a prompt without one.",
    "engine": "transformers, or vllm on several GPUs.",
    "seed": "Draws the records.",
    "device": "auto, cpu, cuda or cuda:N.",
    "revision": "Branch, tag or commit of a hub model.",
    "force": "Replace an earlier result.",
    "as_json": "Print one JSON object on stdout.",
    "quiet": "No progress and no notes.",
}
"""What --help shows, shortly; --help-all shows the rest."""


def trace(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--output", "-o", metavar="TRACE", help="Folder for the trace.")],
    data: DataFlags,
    general: KeepAlsoFlag,
    hub: RevisionFlag,
    run: LoadFlags,
    seed: SeedFlag,
    force: ForceFlag,
    output: OutputFlags,
    stream: StreamFlag,
    engine: Annotated[
        str,
        typer.Option(
            help="transformers (records everything) or vllm (records which experts served each token; enough for "
            "scorers shape and frequency).",
            rich_help_panel=RUN_PANEL,
        ),
    ] = "transformers",
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="With --engine vllm: an argument of vllm.LLM, for example tensor_parallel_size=2.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
) -> None:
    """Record how a model routes a calibration set (at most 128 records unless --samples says otherwise).

    Example: shape-moe trace ./Qwen3-30B-A3B --data gsm8k-train.jsonl -o traces/gsm8k
    """
    talk, leads = output.output(), Ranks.of_this_run().leads
    options = replace(
        data.options(run, seed.seed, DEFAULT_SAMPLES),
        stream=stream.stream,
        keep_also=general.groups(),
        engine=engine,
        engine_args=parse_values(engine_arg, "--engine-arg"),
    )
    talk.begin("Checking the model and the examples ...")
    progress = talk if leads else SILENT
    result = shape_moe.trace(model, options, out, revision=hub.revision, force=force.force, progress=progress)
    if not leads:
        return
    skipped = result.info.source.get("skipped") or {}
    if skipped:
        talk.warn(f"{len(skipped)} records were skipped; the first: {next(iter(skipped.values()))}")
    talk.result(document(result, out), lambda console: show(console, result, out))


def document(result: Trace, out: Path) -> dict[str, Any]:
    """A trace as a JSON object."""
    info = result.info
    return {
        "trace": str(out),
        "model": info.model,
        "fingerprint": info.fingerprint,
        "examples": info.examples,
        "tokens": info.tokens,
        "classes": list(info.classes),
        "left_out": info.left_out,
        "layers": list(info.layers),
        "num_experts": info.num_experts,
        "top_k": info.top_k,
        "skipped": info.source.get("skipped", {}),
    }


def show(console: Console, result: Trace, out: Path) -> None:
    """A trace for a person."""
    info = result.info
    used = (result.sums("tokens") > 0).sum()
    total = len(info.layers) * info.num_experts
    console.print(
        f"[bold]{escape(str(out))}[/bold]  {info.examples} examples, {info.tokens['prompt']:,.0f} prompt and "
        f"{info.tokens['response']:,.0f} response tokens"
    )
    if len(info.classes) > 1:
        console.print(f"{len(info.classes)} classes: {', '.join(info.classes)}", markup=False)
    coalitions = sum(len(table.pooled().members) for table in result.coalitions.values())
    console.print(f"{coalitions:,} coalitions in {len(info.layers)} layers; {used:,} of {total:,} experts were used")
