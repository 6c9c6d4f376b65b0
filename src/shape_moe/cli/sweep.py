"""``shape-moe sweep``: which keep rate is safe."""

from __future__ import annotations

import shlex
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

import shape_moe
from shape_moe.architectures.moe_config import GateScale
from shape_moe.cli.choice_flags import CHOICE_PANEL, GATE_SCALE_HELP, WeightFlags
from shape_moe.cli.console import plain_table, show_commands
from shape_moe.cli.data_flags import DataFlags
from shape_moe.cli.estimates import kl, points, share
from shape_moe.cli.flags import (
    ForceFlag,
    LoadFlags,
    MemoryFlags,
    ModelArgument,
    OutputFlags,
    RevisionFlag,
    SeedFlag,
    StreamFlag,
)
from shape_moe.cli.quality_flags import GenerationFlags, HeldOutFlags, LimitFlags
from shape_moe.cli.values import share_option
from shape_moe.errors import UsageError
from shape_moe.evaluation.keep_rate import Point
from shape_moe.jobs.held_out import HELD_OUT_SAMPLES
from shape_moe.jobs.session import DEFAULT_SAMPLES
from shape_moe.scoring.registry import scorers as known_scorers
from shape_moe.selection.method import Method, Routing, check_gate_scale_name, check_routing, usual_routing
from shape_moe.units import readable_share, readable_size

if TYPE_CHECKING:
    from shape_moe.jobs.sweep import SweepResult

HELPS = {
    "samples": f"Calibrate with at most this many records. Default: {DEFAULT_SAMPLES}.",
    "held_out_samples": f"Judge by at most this many examples. Default: {HELD_OUT_SAMPLES}.",
    "generate": "Let the candidates for a recommendation answer N examples freely.",
    "fit": "Recommend only what fits this memory, KV cache included, for example 24GiB.",
}
"""What options that other verbs have too say to those who sweep."""
FIRST = {
    "data": "Your examples: file, folder or data set.",
    "held_out": "Judge by these, not by a share of --data.",
    "out": "Folder for what is found.",
    "max_kl": "Limit on the KL divergence, such as 0.02.",
    "max_drop": "Limit on the fall of right answers (1%).",
    "keep": "Judge this keep rate; can be repeated.",
    "scorer": "How experts are valued; all for every way.",
    "target": "ragged: best; stock: loads in any tool.",
    "fit": "Recommend only what fits (24GiB).",
    "trace": "Start from a trace instead of making one.",
    "device": "auto, cpu, cuda or cuda:N.",
    "revision": "Branch, tag or commit of a hub model.",
    "force": "Replace an earlier result.",
    "as_json": "Print one JSON object on stdout.",
    "quiet": "No progress and no notes.",
}
"""What --help shows, shortly; --help-all shows the rest."""


def sweep(
    model: ModelArgument,
    data: DataFlags,
    weights: WeightFlags,
    limits: LimitFlags,
    judged_by: HeldOutFlags,
    generation: GenerationFlags,
    memory: MemoryFlags,
    hub: RevisionFlag,
    run: LoadFlags,
    stream: StreamFlag,
    seed: SeedFlag,
    force: ForceFlag,
    output: OutputFlags,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder for the figures, the recommended selection and the trace."
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Start from this trace; its examples are never used to judge.")
    ] = None,
    keep: Annotated[
        list[float] | None,
        share_option(
            "--keep",
            "60%",
            help="A keep rate to judge, such as 60% or 0.6; can be repeated. Default: with a limit, those that the "
            "search for it needs; without one, eight rates from 0.9 to 0.25.",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCORER/RULE, ROUTING",
            help="Scorer, rule, routing, target and gate scale in one, as results spell it: 'reap/uniform, reroute'; "
            "can be repeated.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="How experts are valued; can be repeated; all takes every scorer. Default: shape.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="How layers share the experts that are kept: coverage (the same share of value in each; the "
            "default), uniform (the same number), global (values compared across layers). Can be repeated.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None,
    routing: Annotated[
        list[str] | None,
        typer.Option(
            help="drop (router unchanged, pruned slots add nothing) or reroute (pruned experts leave the router); "
            "give it twice for both. Default: drop; reroute for target stock.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None,
    gate_scale: Annotated[
        list[str] | None,
        typer.Option(help=f"{GATE_SCALE_HELP} Give it twice for both."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="ragged (each layer keeps as many experts as it needs; the default) or stock (the same number in "
            "every layer: loads in any tool).",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None,
) -> None:
    """Find out which keep rate is safe: quality over keep rates from one trace and one loaded model.

    Example: shape-moe sweep ./Qwen3-30B-A3B --data gsm8k-train.jsonl --max-kl 0.02 -o sweeps/gsm8k
    """
    talk = output.output()
    options = shape_moe.SweepOptions(
        keep_rates=tuple(keep) if keep else None,
        limit=limits.limit(),
        methods=_methods(method, scorer, rule, routing, gate_scale, target),
        scoring=weights.options(seed.seed),
        held_out=HELD_OUT_SAMPLES if judged_by.held_out_samples is None else judged_by.held_out_samples,
        generation=generation.required(),
        most_keep=memory.most_keep(model, hub.revision),
    )
    if trace is None and not data.data:
        raise UsageError("Give examples (--data), a trace (--trace), or both.")
    if trace is not None:
        data.refuse_unread(judged_by.held_out)
    given = replace(data.options(run, seed.seed, DEFAULT_SAMPLES), stream=stream.stream) if data.data else None
    talk.begin("Checking the model and the examples ...")
    result = shape_moe.sweep(
        model,
        options,
        out,
        data=given,
        trace=trace,
        held_out=judged_by.data(data, seed.seed),
        revision=hub.revision,
        device=run.place,
        dtype=run.dtype,
        stream=stream.stream,
        trust_remote_code=run.trust_remote_code,
        force=force.force,
        progress=talk,
    )
    talk.result(result.document, lambda console: _show(console, result, model, out))


def _methods(
    spelled: list[str] | None,
    scorers: list[str] | None,
    rules: list[str] | None,
    routings: list[str] | None,
    scales: list[str] | None,
    target: str | None,
) -> tuple[Method, ...]:
    """The methods that are spelled out, or every combination of the words that are given."""
    if spelled:
        words = {
            "--scorer": scorers,
            "--rule": rules,
            "--routing": routings,
            "--gate-scale": scales,
            "--target": target,
        }
        twice = [option for option, given in words.items() if given]
        if twice:
            raise UsageError(f"--method says that already: leave {', '.join(twice)} out.")
        return tuple(dict.fromkeys(Method.parse(text) for text in spelled))
    made_for = target or "ragged"
    return tuple(
        Method(valued, shared, routed, made_for, scale)
        for valued in _scorers(scorers)
        for shared in rules or ["coverage"]
        for routed, scale in _routed(routings, scales, made_for)
    )


def _routed(routings: list[str] | None, scales: list[str] | None, target: str) -> list[tuple[Routing, GateScale]]:
    """Routings with their gate scales, which are those of reroute where drop is swept beside it."""
    named = [check_gate_scale_name(name) for name in scales or ["survivors"]]
    usual: GateScale = "survivors"
    found = []
    for routing in [check_routing(name) for name in routings or ()] or [usual_routing(target, named[0])]:
        beside = routing == "drop" and len(routings or ()) > 1
        found += [(routing, scale) for scale in ([usual] if beside else named)]
    return found


def _scorers(named: list[str] | None) -> tuple[str, ...]:
    if named == ["all"]:
        return tuple(known_scorers())
    return tuple(named or ["shape"])


def _show(console: Console, result: SweepResult, model: str, out: Path | None) -> None:
    console.print(f"{result.document['split']}.", markup=False)
    dense = result.document["dense"]
    quality = dense["quality"]
    exact = f", exact match {readable_share(quality['exact_match']['value'])}" if "exact_match" in quality else ""
    console.print(f"Dense model: {readable_size(dense['bytes'])}, nll {quality['nll']['value']:.4f}{exact}")
    marks = {result.recommendation.chosen: "recommended"}
    places = list(enumerate(result.recommendation.points))
    for method, group in groupby(places, key=lambda place: place[1].method):
        table = plain_table(
            "keep", "weights", "KL to dense", "same top-1", "exact match", "points", "limit", "", title=str(method)
        )
        for i, point in sorted(group, key=lambda place: -place[1].selection.kept):
            table.add_row(*_row(point), marks.get(i, ""), style="bold green" if i in marks else None)
        console.print(table)
        console.print()
    console.print(result.recommendation.reason, markup=False)
    if result.chosen is not None and out is not None:
        chosen = result.chosen.selection
        size = f"{chosen.kept:,} of {chosen.total:,} experts"
        layers = f"{len(chosen.layers)} layers of {chosen.num_experts}"
        console.print(f"To write it ({size} in {layers}), and to look at all of this:", markup=False)
        folder = shlex.quote(str(out))
        recommended = shlex.quote(str(out / "recommended.json"))
        prune = f"shape-moe prune {shlex.quote(model)} --selection {recommended} -o SMALLER"
        show_commands(console, (prune, f"shape-moe report {folder} -o report.html"))


def _row(point: Point) -> tuple[str, ...]:
    quality, change = point.measured.quality, point.measured.change
    exact = quality.get("exact_match")
    words = {True: "within", False: "beyond", None: ""}[point.meets]
    if point.fits is False:
        words += ", too large"
    if point.healthy is False:
        words += ", unhealthy"
    return (
        readable_share(point.selection.keep),
        readable_size(point.size),
        kl(quality["kl"]),
        share(quality["top1"]),
        readable_share(exact.value) if exact else "",
        points(change["exact_match"]) if exact else "",
        words,
    )
