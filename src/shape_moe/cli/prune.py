"""``shape-moe prune``: the whole job in one command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import shape_moe
from shape_moe.architectures.gguf_file import is_gguf
from shape_moe.calibration.records import DataOptions
from shape_moe.cli.choice_flags import CHOICE_PANEL, ScoreFlags, SelectFlags
from shape_moe.cli.console import Output, plain_table, show_commands
from shape_moe.cli.data_flags import DataFlags, KeepAlsoFlag
from shape_moe.cli.estimates import kl, points
from shape_moe.cli.flag_groups import changed_flags
from shape_moe.cli.flags import (
    REJECTED,
    ForceFlag,
    LoadFlags,
    MemoryFlags,
    ModelArgument,
    OutputFlags,
    RevisionFlag,
    SeedFlag,
    StreamFlag,
)
from shape_moe.cli.prune_checks import check_rate_options, check_target, is_automatic, refuse_ignored
from shape_moe.cli.pruned_shown import checked_lines, pruned_document, series_document, show_series
from shape_moe.cli.quality_flags import GenerationFlags, HeldOutFlags, LimitFlags, NoGeneral
from shape_moe.cli.select import notes_on
from shape_moe.cli.values import Shares, shares_option
from shape_moe.errors import UsageError
from shape_moe.evaluation.intervals import Estimate
from shape_moe.evaluation.keep_rate import Limit
from shape_moe.evaluation.verdict import MAX_DROP
from shape_moe.jobs.choice import AUTO_HELD_OUT, MOST_PASSES, ChoiceOptions, check_effort
from shape_moe.jobs.held_out import HELD_OUT_SAMPLES
from shape_moe.jobs.judgement import JudgementOptions
from shape_moe.jobs.judging_plan import MINUTES
from shape_moe.jobs.prune_options import PAPER_SAMPLES, PruneOptions
from shape_moe.jobs.select import AUTO
from shape_moe.jobs.session import DEFAULT_SAMPLES
from shape_moe.selection.method import check_routing
from shape_moe.selection.selection import load_selection
from shape_moe.units import joined, readable_share

if TYPE_CHECKING:
    from shape_moe.jobs.prune import PruneResult
    from shape_moe.jobs.prune_series import SeriesResult

HELPS = {
    "samples": f"Calibrate with at most this many records. Default: {DEFAULT_SAMPLES}, or "
    f"{PAPER_SAMPLES} where a method is named.",
    "scorer": "How experts are valued (shape-moe score --list explains them). Default: auto, which judges several "
    "methods on a part of the data and takes the best.",
    "max_kl": "Instead of --keep: keep as few as stay within this KL divergence to the dense model (how much its "
    "predictions change), in nats per token.",
    "max_drop": "Instead of --keep: keep as few as lose no more right answers than this, such as 1% or 0.01.",
    "held_out": "Judge candidates by these examples, where no method is named. Default: a share of --data.",
    "held_out_samples": f"Judge by at most this many examples. Default: {HELD_OUT_SAMPLES} with a limit, else "
    f"{AUTO_HELD_OUT}.",
    "generate": "Let a candidate answer N examples freely before it is chosen.",
    "fit": "Instead of --keep: keep as many as fit this memory, KV cache included, for example 24GiB.",
}
"""What options that other verbs have too say to those who prune."""
FIRST = {
    "out": "",
    "data": "Your examples: file, folder or data set.",
    "keep": "Share to keep: 60%. Several: 0.8,0.6.",
    "fit": "Or: keep what fits this memory (24GiB).",
    "max_drop": "Or: keep as few as lose at most this (1%).",
    "target": "ragged: best; stock: loads in any tool.",
    "scorer": "How experts are valued; default: the best of several.",
    "effort": "fast, default or thorough.",
    "engine": "vllm, llama.cpp, mlx, sglang, transformers.",
    "samples": "Calibrate with at most N records.",
    "require": "safe or no-loss: reject what is worse.",
    "trace": "Start from a trace instead of --data.",
    "selection": "Start from a selection: only write it.",
    "device": "auto, cpu, cuda or cuda:N.",
    "revision": "Branch, tag or commit of a hub model.",
    "force": "Replace an earlier result.",
    "as_json": "Print one JSON object on stdout.",
    "quiet": "No progress and no notes.",
}
"""What --help shows, shortly; --help-all shows the rest."""


def prune(
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder for the pruned checkpoint; for a GGUF model NAME.gguf."
        ),
    ],
    data: DataFlags,
    general: KeepAlsoFlag,
    select: SelectFlags,
    score: ScoreFlags,
    limits: LimitFlags,
    judged_by: HeldOutFlags,
    generation: GenerationFlags,
    memory: MemoryFlags,
    hub: RevisionFlag,
    run: LoadFlags,
    seed: SeedFlag,
    force: ForceFlag,
    output: OutputFlags,
    stream: StreamFlag,
    keep: Annotated[
        Shares | None,
        shares_option(
            "--keep",
            "60%",
            help="Share of the routed experts to keep, over all layers, such as 60% or 0.6. Several, as 0.85,0.75,0.6, "
            "make a series: the folder DIR with the models DIR-0.85, DIR-0.75 and DIR-0.6 (of a GGUF file with "
            "DIR-0.85.gguf and so on), each within the larger one, judged together.",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Start from this trace instead of tracing --data; what --data gives then only judges."),
    ] = None,
    selection: Annotated[
        Path | None,
        typer.Option(
            help="Start from this selection: only write and check the checkpoint; --data gives examples to judge by."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="paper: the published method (shape, coverage, drop, ragged, 25 samples; classes of a mixed data set "
            "are added up)."
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="ENGINE",
            help="What is to load the result: vllm, llama.cpp, mlx, sglang or transformers. It decides --target.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None,
    effort: Annotated[
        str,
        typer.Option(
            help="What choosing may cost. fast: nothing is judged, the recommended method is taken; default: at most "
            f"{MOST_PASSES:.0f} forward passes of the calibration set; thorough: more candidates, and layers measured "
            "in both routings.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = "default",
    no_judge: Annotated[bool, typer.Option("--no-judge", help="Do not judge the pruned model at the end.")] = False,
    no_general: NoGeneral = False,
    judge_minutes: Annotated[
        float,
        typer.Option(metavar="MINUTES", help="Judge only a part of the examples if all would take longer than this."),
    ] = MINUTES,
    require: Annotated[
        str | None,
        typer.Option(
            metavar="VERDICT",
            help="safe or no-loss: end with code 3 and leave the model in DIR.rejected if it is judged worse.",
        ),
    ] = None,
    refit: Annotated[
        str,
        typer.Option(
            metavar="on|off|auto",
            help="Repair the kept experts without training: solve their down projections again by least squares. auto "
            "does so where examples that neither calibrate nor report show a gain.",
        ),
    ] = "off",
    imatrix: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An imatrix of the original: that of the pruned model is sliced from it, into the folder beside the "
            "GGUF file (of a model folder: DIR/shape).",
        ),
    ] = None,
    no_logits: Annotated[
        bool,
        typer.Option("--no-logits", help="Do not compare logits, and record no answers for later checks (the canary)."),
    ] = False,
) -> None:
    """Trace a task set, choose experts, and write a checkpoint without the others.

    Example: shape-moe prune ./Qwen3-30B-A3B --data gsm8k-train.jsonl --keep 0.6 -o ./Qwen3-gsm8k-0.6
    """
    talk = output.output()
    if preset not in (None, "paper"):
        raise UsageError(f"There is no preset {preset!r}; there is paper.")
    typed = (select, score)
    select, score = select.spelled_out(score)
    if engine is not None:
        select = _for_engine(engine, model, hub.revision, select)
    if selection is None and is_gguf(Path(model)):  # llama.cpp loads equal counts only
        select = replace(select, target=select.target or "stock", allow_rounding=True)
    limit = limits.limit()
    rates = keep.values if keep is not None else ()
    check_rate_options(rates, memory.fit, selection, limit)
    choice = None
    automatic = selection is None and is_automatic(preset, select, score, limit)
    if limit is not None or automatic:
        choice = _choice(limit, select, generation, judged_by.data(data, seed.seed), judged_by.held_out_samples)
        named_scale = select.gate_scale is not None
        choice = replace(choice, effort=check_effort(effort), insist=score.scorer == AUTO, keeps_gate_scale=named_scale)
        score = replace(score, scorer=AUTO) if automatic else score
    elif idle := changed_flags(judged_by) + changed_flags(generation) + ([] if effort == "default" else ["--effort"]):
        raise UsageError(
            f"{joined(idle)} has no effect where a method is named: leave --scorer, --rule, --method, --preset and "
            "--selection out to judge candidates."
        )
    given = (data, general, *typed, judged_by)
    refuse_ignored(*given, trace, selection, chooses=choice is not None, judge=not no_judge)
    if preset == "paper":
        score = replace(score, pool_classes=True)
    most = memory.most_keep(model, hub.revision)
    if most is not None:
        talk.note(
            f"A keep rate of {most:.4f} is the most that fits {memory.fit}."
            if most < 1
            else f"The unpruned model already fits {memory.fit}: nothing has to be removed."
        )
        rates, select = (most,), replace(select, allow_rounding=True)
    if selection is not None:
        check_target(select.target, load_selection(selection))
    samples = PAPER_SAMPLES if choice is None else DEFAULT_SAMPLES
    made = trace is not None or selection is not None
    reads_data = not made or data.data
    asked = 1.0 if limit is not None else min(rates, default=None)
    options = PruneOptions(
        select=select.options(asked, score, seed.seed) if asked is not None else None,
        trace=replace(data.options(run, seed.seed, samples), keep_also=general.groups()) if reads_data else None,
        device=run.place,
        dtype=run.dtype,
        trust_remote_code=run.trust_remote_code,
        stream=stream.stream,
        choice=choice,
        judgement=_judgement(
            limit, require, judge_minutes, data.samples if made else None, judge=not no_judge, general=not no_general
        ),
        refit=refit,
        imatrix=imatrix,
        check_logits=not no_logits,
        force=force.force,
    )
    talk.begin("Checking the model and the examples ...")
    if len(rates) > 1:
        series = shape_moe.prune_series(model, out, rates, options, trace=trace, revision=hub.revision, progress=talk)
        _tell_series(talk, series, require)
        return
    result = shape_moe.prune(
        model, out, options, trace=trace, selection=selection, revision=hub.revision, progress=talk
    )
    _tell(talk, result, require)


def _tell(talk: Output, result: PruneResult, require: str | None) -> None:
    """Say what became of a model, and end with a code of its own where that is not good enough."""
    for note in result.notes:
        talk.warn(note)
    talk.result(pruned_document(result), lambda console: _show(console, result))
    if result.rejected:
        talk.warn(f"The model does not meet --require {require}; it was left in {result.path}.")
        raise typer.Exit(REJECTED)


def _tell_series(talk: Output, result: SeriesResult, require: str | None) -> None:
    """Say what became of a series, and end with a code of its own where not all of it is good enough."""
    for note in result.notes:
        talk.warn(note)
    talk.result(series_document(result), lambda console: show_series(console, result))
    if result.rejected:
        talk.warn(f"Models that do not meet --require {require} have .rejected in their names.")
        raise typer.Exit(REJECTED)


def _judgement(
    limit: Limit | None, require: str | None, minutes: float, examples: int | None, *, judge: bool, general: bool
) -> JudgementOptions | None:
    """How the pruned model is judged."""
    if not judge:
        idle = {"--require": require is not None, "--judge-minutes": minutes != MINUTES, "--no-general": not general}
        if needing := [name for name, given in idle.items() if given]:
            raise UsageError(f"{joined(needing)} needs the judgement: leave --no-judge out.")
        return None
    drop = limit.value if limit is not None and limit.kind == "max_drop" else MAX_DROP
    options = JudgementOptions(max_drop=drop, require=require, general=general, minutes=minutes)
    return options if examples is None else replace(options, examples=examples)


def _choice(
    limit: Limit | None,
    select: SelectFlags,
    generation: GenerationFlags,
    held_out: DataOptions | None,
    samples: int | None,
) -> ChoiceOptions:
    """How candidates are judged."""
    if select.tolerance is not None:
        raise UsageError("--tolerance reproduces one published selection; leave it out where candidates are judged.")
    routing = check_routing(select.routing) if select.routing else None
    return ChoiceOptions(
        limit=limit,
        rules=(select.rule,) if select.rule else None,
        routings=(routing,) if routing else None,
        held_out=held_out,
        held_out_samples=samples,
        generation=generation.required(),
    )


def _for_engine(engine: str, model: str, revision: str | None, select: SelectFlags) -> SelectFlags:
    """The flags, with the target that an engine needs."""
    from shape_moe.architectures.snapshot import open_snapshot
    from shape_moe.serving.engines import target_for

    needed = target_for(engine, open_snapshot(model, revision).moe.family.model_type, gguf=is_gguf(Path(model)))
    if select.target == "ragged" and needed == "stock":
        raise UsageError(f"--for {engine} needs --target stock: it loads only equal counts in every layer.")
    return replace(select, target=select.target or needed)


def _show_choice(console: Console, choice: dict[str, Any]) -> None:
    """What was tried, best first."""
    columns = ("tried", "keep", "KL to dense", "exact match, points")
    table = plain_table(*columns, title=f"Judged by {choice['examples']} held-out examples")
    for entry in sorted(choice["tried"], key=lambda entry: (entry["keep"], entry["kl"]["value"])):
        change = entry["exact_match_change"]
        changed = points(Estimate.from_document(change)) if change else ""
        divergence = kl(Estimate.from_document(entry["kl"]))
        table.add_row(entry["method"], readable_share(entry["keep"]), divergence, changed)
    console.print(table)
    console.print(f"Chosen: {choice['reason']}", markup=False)


def _show(console: Console, result: PruneResult) -> None:
    """How it was chosen and checked, then the lines that card and report open with, then what to type next."""
    if result.selection.choice is not None:
        _show_choice(console, result.selection.choice)
    judged = result.judgement
    forgotten = judged.forgotten.lines() if judged is not None and judged.forgotten is not None else []
    for line in (*notes_on(result.selection), *checked_lines(result), *forgotten):
        console.print(line, markup=False)
    console.print()
    console.print(f"[bold]{escape(str(result.path))}[/bold]")
    for line in result.opening.lines() if result.opening is not None else ():
        console.print(line, markup=False)
    show_commands(console, result.following)
