"""``shape-moe evaluate``: what pruning cost, beside the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import shape_moe
from shape_moe.calibration.records import DataOptions
from shape_moe.cli.console import Output, plain_table
from shape_moe.cli.data_flags import DataFlags
from shape_moe.cli.endpoint_flags import EndpointFlags
from shape_moe.cli.estimates import number, share, signed
from shape_moe.cli.flag_groups import changed_flags
from shape_moe.cli.flags import REJECTED, ForceFlag, LoadFlags, OutputFlags, RevisionFlag, SeedFlag
from shape_moe.cli.quality_flags import GenerationFlags, TaskFlags
from shape_moe.cli.values import share_option
from shape_moe.errors import UsageError
from shape_moe.evaluation.evaluated import TASK, Evaluated, Evaluation
from shape_moe.evaluation.faithfulness import Faithfulness
from shape_moe.evaluation.footprint import Workload
from shape_moe.evaluation.measures import worst_group
from shape_moe.evaluation.verdict import MAX_DROP, check_requirement
from shape_moe.jobs.evaluate import EvaluateOptions
from shape_moe.jobs.evaluate_endpoints import EndpointOptions
from shape_moe.jobs.held_out import HELD_OUT_SAMPLES
from shape_moe.jobs.session import ExampleOptions
from shape_moe.units import readable_size
from shape_moe.workspace import check_output_file, write_json

ALSO_SAMPLES = 100
HELPS = {"samples": f"Judge by at most this many records. Default: {HELD_OUT_SAMPLES}."}
FIRST = {
    "data": "Examples that nothing was made from.",
    "samples": "",
    "out": "",
    "by": "Judge every value of this field by itself.",
    "also": "Examples of something else than the task.",
    "answer_pattern": "The part that must be right: '#### (.*)'.",
    "generate": "Let models answer N examples freely.",
    "max_drop": "The fall that 'safe' allows. Default: 2%.",
    "tasks": "Benchmarks of lm-evaluation-harness.",
    "endpoint": "Judge servers: dense=URL, then others.",
    "require": "safe or no-loss: exit code 3 if worse.",
    "device": "auto, cpu, cuda or cuda:N.",
    "revision": "Branch, tag or commit of a hub model.",
    "force": "Replace an earlier result.",
    "as_json": "Print one JSON object on stdout.",
    "quiet": "No progress and no notes.",
}
"""What --help shows, shortly; --help-all shows the rest."""


def evaluate(
    data: DataFlags,
    generation: GenerationFlags,
    served: EndpointFlags,
    tasks: TaskFlags,
    hub: RevisionFlag,
    run: LoadFlags,
    seed: SeedFlag,
    force: ForceFlag,
    output: OutputFlags,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="The dense model: a folder, or a model's name on the hub.")
    ] = None,
    candidates: Annotated[
        list[str] | None,
        typer.Argument(metavar="PRUNED", help="Pruned checkpoints, and selections to judge as masks on MODEL."),
    ] = None,
    also: Annotated[
        str | None, typer.Option(metavar="FILE", help="Examples of something else: what is lost off the task.")
    ] = None,
    by: Annotated[str | None, typer.Option(metavar="FIELD", help="Judge every value of this field by itself.")] = None,
    faithfulness: Annotated[
        int, typer.Option(metavar="N", help="Compare each selection with its inversion and N random ones (3 or more).")
    ] = 0,
    max_drop: Annotated[
        float,
        share_option(
            "--max-drop",
            "1%",
            help=f"How far right answers may fall for the verdict 'safe', such as 1% or 0.01. Default: {MAX_DROP:.0%}.",
            show_default=False,
        ),
    ] = MAX_DROP,
    require: Annotated[
        str | None,
        typer.Option(metavar="VERDICT", help="safe or no-loss: end with code 3 where a pruned model is judged worse."),
    ] = None,
    no_general: Annotated[
        bool, typer.Option("--no-general", help="Leave general prompts out: what was forgotten off the task.")
    ] = False,
    trace: Annotated[Path | None, typer.Option(help="The trace that selections were made from.")] = None,
    footprint: Annotated[
        bool,
        typer.Option(
            "--footprint/--no-footprint",
            help="Measure memory, loading time and speed too; only on a machine that does nothing else.",
            show_default=False,
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write every figure into this JSON file.")
    ] = None,
) -> None:
    """Judge pruned models on held-out examples: likelihood, distance to the dense model, answers, benchmarks.

    Example: shape-moe evaluate ./Qwen3-30B-A3B ./Qwen3-gsm8k-0.6 --data gsm8k-test.jsonl --samples 200
    """
    talk = output.output()
    if out is not None:
        check_output_file(out, force=force.force)
    if require is not None:
        check_requirement(require)
        if not served.endpoint and not (candidates and data.data):
            raise UsageError("--require needs pruned models and examples to judge them by (--data).")
    if changed_flags(served):
        named = {"MODEL": model, "PRUNED": candidates, "--also": also, "--faithfulness": faithfulness}
        unused = [name for name, value in named.items() if value] + changed_flags(tasks) + changed_flags(run)
        unused += changed_flags(hub)
        served.refuse_unused(unused + [name for name in changed_flags(generation) if name == "--generate"], data)
        asked = EndpointOptions(
            models=served.models(),
            by=by,
            answer_pattern=generation.answer_pattern,
            max_new_tokens=generation.answer_tokens,
            max_drop=max_drop,
            general=not no_general,
            trace=str(trace) if trace else None,
            top_logprobs=served.top_logprobs,
            timeout=served.timeout,
            at_a_time=data.batch_size,
            seed=seed.seed,
        )
        result = _evaluate_served(served.addresses(), data.options(run, seed.seed, HELD_OUT_SAMPLES), asked, out, talk)
        _check_required(talk, result, require)
        return
    if model is None:
        raise UsageError(
            "Give the dense model (MODEL), or servers to judge (--endpoint dense=URL --endpoint pruned=URL)."
        )
    options = EvaluateOptions(
        also=DataOptions(also, samples=ALSO_SAMPLES, seed=seed.seed) if also else None,
        by=by,
        generation=generation.options(),
        tasks=tasks.options(),
        footprint=Workload() if footprint else None,
        faithfulness=faithfulness,
        trace=str(trace) if trace else None,
        max_drop=max_drop,
        general=not no_general,
        seed=seed.seed,
    )
    given = data.options(run, seed.seed, HELD_OUT_SAMPLES) if data.data else None
    if given is None and changed_flags(data):
        raise UsageError(f"{', '.join(changed_flags(data))} says how examples are read: give --data.")
    talk.begin("Checking the model and the examples ...")
    result = shape_moe.evaluate(
        model,
        candidates or [],
        data=given,
        options=options,
        revision=hub.revision,
        device=run.device,
        dtype=run.dtype,
        trust_remote_code=run.trust_remote_code,
        progress=talk,
    )
    _tell(talk, result, out, by_pattern=generation.answer_pattern is not None)
    _check_required(talk, result, require)


def _evaluate_served(
    endpoints: dict[str, str], data: ExampleOptions, options: EndpointOptions, out: Path | None, talk: Output
) -> Evaluation:
    """Judge what servers answer; answers stand beside the result's file until that is written."""
    journal = out.with_name(f"{out.name}.answers.jsonl") if out is not None else None
    result = shape_moe.evaluate_endpoints(endpoints, data, options, journal=journal, progress=talk)
    _tell(talk, result, out, by_pattern=False)
    if journal is not None:
        journal.unlink(missing_ok=True)
    return result


def _check_required(talk: Output, result: Evaluation, require: str | None) -> None:
    """End with code 3 where a model is not as good as it was required to be."""
    if require is None:
        return
    worse = [found.name for found in result.models if found.verdict and not found.verdict.satisfies(require)]
    if worse:
        talk.warn(f"Not what --require {require} asks for: {', '.join(worse)}.")
        raise typer.Exit(REJECTED)


def _tell(talk: Output, result: Evaluation, out: Path | None, *, by_pattern: bool) -> None:
    """Write the result into its file, and say it."""
    for note in result.warnings:
        talk.warn(note)
    if out is not None:
        write_json(out, result.to_document())
        talk.note(f"Wrote {out}")
    talk.result(result.to_document(), lambda console: _show(console, result, by_pattern=by_pattern))


def _show(console: Console, result: Evaluation, *, by_pattern: bool) -> None:
    for found in result.models:
        if found.verdict is not None:
            sizes = [readable_size(model.size) for model in (found, result.models[0]) if model.size is not None]
            console.print(f"{found.name}: {' instead of '.join(sizes)}" if sizes else found.name, markup=False)
            lines = [*found.verdict.lines(), *(found.forgotten.lines() if found.forgotten else ())]
            for line in lines:
                console.print(f"  {line}", markup=False, soft_wrap=True)
            console.print()
    for name in result.models[0].sets:
        _show_set(console, result, name, by_pattern=by_pattern)
    if result.models[0].tasks:
        _show_tasks(console, result)
    _show_footprints(console, result)
    for found in result.models:
        if (worst := worst_group(found.classes)) is not None:
            name, figure = worst
            lost = found.classes[name]["change"][figure]
            change = f"{figure.replace('_', ' ')} {signed(lost) if figure == 'exact_match' else number(lost, 4)}"
            console.print(f"{found.name}: worst class is {name!r} ({change})", markup=False)
    for check in result.faithfulness:
        _show_faithfulness(console, check)


def _show_set(console: Console, result: Evaluation, name: str, *, by_pattern: bool) -> None:
    source = result.data if name == TASK else result.also
    title = f"{source}: figures with 95 % intervals"
    columns = ("model", "nll", "perplexity", "KL to dense", "same top-1", "exact match", "change", "loops", "no end")
    table = plain_table(*columns, title=title)
    for found in result.models:
        verdict = found.sets[name]
        health = verdict.health.figures if verdict.health else {}
        exact, change = verdict.quality.get("exact_match"), verdict.change.get("exact_match")
        if by_pattern and verdict.health is not None:
            exact, change = health["exact_match"], verdict.health.change.get("exact_match")
        table.add_row(
            found.name,
            number(verdict.quality["nll"], 4),
            number(verdict.quality["perplexity"], 3),
            number(verdict.quality["kl"], 4) if verdict.change else "",
            share(verdict.quality["top1"]) if verdict.change else "",
            share(exact) if exact else "",
            signed(change) if change else "",
            f"{health['loop_rate'].value:.1%}" if health else "",
            f"{health['no_end_rate'].value:.1%}" if health else "",
        )
    console.print(table)


def _show_tasks(console: Console, result: Evaluation) -> None:
    table = plain_table("model", "task", "metric", "items", "score", "change", title="lm-evaluation-harness")
    for column in table.columns[1:3]:
        column.justify = "left"
    for found in result.models:
        for name, scored in found.tasks.items():
            changes = (found.task_changes or {}).get(name, {})
            for metric, estimate in scored.metrics.items():
                change = number(changes[metric], 4) if metric in changes else ""
                table.add_row(found.name, name, metric, f"{scored.items:,}", number(estimate, 4), change)
    console.print(table)


def _size(found: Evaluated) -> str:
    return readable_size(found.size) if found.size is not None else ""


def _show_footprints(console: Console, result: Evaluation) -> None:
    if result.models[0].footprint is None:
        return
    table = plain_table("model", "on disk", "peak memory", "load", "prefill", "decode", title="Memory and speed")
    for found in result.models:
        taken = found.footprint
        if taken is None:
            size = _size(found)
            table.add_row(found.name, f"({size})" if found.kind == "mask" else size, "", "", "", "")
            continue
        table.add_row(
            found.name,
            _size(found),
            readable_size(taken.peak_bytes),
            f"{taken.load_seconds:.1f} s",
            f"{taken.prefill_tokens_per_second:,.0f} token/s",
            f"{taken.decode_tokens_per_second:,.0f} token/s",
        )
    console.print(table)
    if any(found.kind == "mask" for found in result.models):
        console.print("Sizes in brackets are what a checkpoint would have; a mask itself saves nothing.")


def _show_faithfulness(console: Console, check: Faithfulness) -> None:
    table = plain_table("experts kept", "KL to dense", "nll", title=f"Faithfulness of {check.name}")
    rows = [("the selection", check.kept), ("its inversion", check.inverted)]
    rows += [(f"random {i + 1}", verdict) for i, verdict in enumerate(check.random)]
    for name, verdict in rows:
        table.add_row(name, number(verdict.quality["kl"], 4), number(verdict.quality["nll"], 4))
    console.print(table)
    console.print(
        "Better than every random selection, and those better than the inversion: the values mean something."
        if check.faithful
        else "[yellow]Not better than random, or random not better than the inversion: the values mean little.[/yellow]"
    )
