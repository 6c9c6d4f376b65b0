"""``shape-moe measure``: what each layer's cut costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shape_moe.cli.choice_flags import GATE_SCALE_HELP, ScoreFlags
from shape_moe.cli.console import plain_table
from shape_moe.cli.data_flags import DataFlags
from shape_moe.cli.flags import ForceFlag, LoadFlags, ModelArgument, OutputFlags, RevisionFlag, SeedFlag
from shape_moe.jobs import measure as job
from shape_moe.jobs.session import DEFAULT_SAMPLES
from shape_moe.selection.layer_curves import LayerCurves
from shape_moe.selection.method import Method, check_gate_scale_name, routing_for

FIRST = {
    "trace": "",
    "out": "",
    "data": "Examples, as a rule those that were traced.",
    "scorer": "How experts are ranked (score --list).",
    "routing": "drop or reroute.",
    "samples": "",
    "seed": "Draws the records.",
    "device": "auto, cpu, cuda or cuda:N.",
    "force": "Replace an earlier result.",
    "as_json": "Print one JSON object on stdout.",
    "quiet": "No progress and no notes.",
}
"""What --help shows, shortly; --help-all shows the rest."""


def measure(
    model: ModelArgument,
    trace: Annotated[Path, typer.Option(metavar="TRACE", help="The model's trace, which ranks the experts.")],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="CURVES", help="Write the layer curves to this file.")],
    data: DataFlags,
    score: ScoreFlags,
    hub: RevisionFlag,
    run: LoadFlags,
    seed: SeedFlag,
    force: ForceFlag,
    output: OutputFlags,
    routing: Annotated[
        str | None, typer.Option(help="In which routing layers are cut: drop (the default) or reroute.")
    ] = None,
    gate_scale: Annotated[str | None, typer.Option(help=GATE_SCALE_HELP)] = None,
) -> None:
    """Measure what each layer loses when it alone is cut, for select --rule measured.

    Example: shape-moe measure ./Qwen3-30B-A3B --trace traces/gsm8k --data gsm8k-train.jsonl -o curves.json
    """
    talk = output.output()
    scale = check_gate_scale_name(gate_scale or "survivors")
    method = Method(score.named, "measured", routing_for("ragged", routing, scale), gate_scale=scale)
    method.check()
    curves = job.measure(
        model,
        trace,
        data.options(run, seed.seed, DEFAULT_SAMPLES),
        out,
        method=method,
        scoring=score.options(seed.seed),
        revision=hub.revision,
        force=force.force,
        progress=talk,
    )
    talk.note(f"Wrote {out}")
    document = {"curves": str(out), "layers": list(curves.layers), "counts": list(curves.counts)}
    costs = curves.costs()[:, list(curves.counts)]
    talk.result({**document, "kl": costs.tolist()}, lambda console: _show(console, curves))


def _show(console: Console, curves: LayerCurves) -> None:
    """KL by layer at each measured count."""
    title = f"KL to the dense model when a layer alone keeps so many of {curves.num_experts} experts"
    table = plain_table("layer", *(str(count) for count in curves.counts), title=title)
    costs = curves.costs()
    for row, layer in enumerate(curves.layers):
        table.add_row(str(layer), *(f"{costs[row, count]:.3g}" for count in curves.counts))
    console.print(table)
