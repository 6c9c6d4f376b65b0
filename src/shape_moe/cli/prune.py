"""``shape-moe prune``: the whole job in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.cli.flags import (
    DataFlags,
    DeviceFlags,
    ForceFlag,
    ModelArgument,
    OutputFlags,
    ScoreFlags,
    SeedFlag,
    SelectFlags,
    changed_flags,
    with_flags,
)
from shape_moe.cli.select import summary
from shape_moe.cli.values import parse_count, parse_size
from shape_moe.errors import UsageError
from shape_moe.jobs import prune as job
from shape_moe.jobs.inspect import keep_that_fits
from shape_moe.reporting.model_card import readable_size
from shape_moe.selection.selection import load_selection


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("prune")(with_flags(prune))


def prune(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the pruned checkpoint.")],
    data: DataFlags,
    select: SelectFlags,
    score: ScoreFlags,
    run: DeviceFlags,
    seed: SeedFlag,
    force: ForceFlag,
    output: OutputFlags,
    keep: Annotated[float | None, typer.Option(help="Share of the routed experts to keep, over all layers.")] = None,
    fit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Keep as many as fit this memory, as 24GiB, instead of --keep.")
    ] = None,
    context: Annotated[str, typer.Option(help="With --fit: tokens per sequence in the KV cache.")] = "4096",
    concurrency: Annotated[int, typer.Option(help="With --fit: sequences in the KV cache.")] = 1,
    trace: Annotated[Path | None, typer.Option(help="Start from this trace instead of --data.")] = None,
    selection: Annotated[Path | None, typer.Option(help="Start from this selection instead of --data.")] = None,
    preset: Annotated[
        str, typer.Option(help="paper: shape, coverage, drop, ragged, 25 samples; other options override it.")
    ] = "paper",
    no_logits: Annotated[
        bool, typer.Option("--no-logits", help="Compare tensors only, not logits; writes no canary.")
    ] = False,
) -> None:
    """Trace a task set, choose experts, and write a checkpoint without the others.

    Example: shape-moe prune ./Qwen3-30B-A3B --data gsm8k-train.jsonl --keep 0.6 -o ./Qwen3-gsm8k-0.6
    """
    talk = output.output()
    if preset != "paper":
        raise UsageError(f"There is no preset {preset!r}; there is paper.")
    rate = _keep_rate(model, keep, fit, context, concurrency, selection)
    _refuse_ignored(data, select, score, trace, selection)
    chosen = load_selection(selection) if selection is not None else None
    options = job.PruneOptions(
        select=select.job(rate, score, seed.seed) if rate is not None else None,
        trace=data.options(run, seed.seed, job.PAPER_SAMPLES) if trace is None and selection is None else None,
        target=select.target or (chosen.constraints.get("target", "ragged") if chosen else "ragged"),
        device=run.device,
        dtype=run.dtype,
        check_logits=not no_logits,
        force=force.force,
    )
    result = job.prune(model, out, options, trace=trace, selection=chosen, progress=talk)
    for note in result.notes:
        talk.warn(note)
    talk.result(_document(result), lambda console: _show(console, result, options.target))


def _keep_rate(
    model: str, keep: float | None, fit: str | None, context: str, concurrency: int, selection: Path | None
) -> float | None:
    given = [option for option, value in (("--keep", keep), ("--fit", fit), ("--selection", selection)) if value]
    if keep == 0:
        raise UsageError("The keep rate must be above 0 and at most 1, not 0; 0.6 keeps 60 % of the experts.")
    if not given:
        raise UsageError("No keep rate is safe for every model: give --keep (such as 0.8) or --fit (such as 24GiB).")
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other; give one of them.")
    if fit is not None:
        return keep_that_fits(open_snapshot(model), parse_size(fit), parse_count(context), concurrency)
    return keep


def _refuse_ignored(
    data: DataFlags, select: SelectFlags, score: ScoreFlags, trace: Path | None, selection: Path | None
) -> None:
    """Refuse options that would change nothing, because a trace or a selection has decided already."""
    if trace is not None and selection is not None:
        raise UsageError("--trace and --selection exclude each other; give one of them.")
    if trace is None and selection is None:
        return
    decided = "--selection" if selection is not None else "--trace"
    ignored = changed_flags(data)
    if selection is not None:
        ignored += changed_flags(score) + [name for name in changed_flags(select) if name != "--target"]
    if ignored:
        raise UsageError(f"{decided} has decided that already: leave {', '.join(ignored)} out.")


def _document(result: job.PruneResult) -> dict[str, Any]:
    return {
        "checkpoint": str(result.path),
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "kept": result.selection.kept,
        "total": result.selection.total,
        "keep": result.selection.keep,
        "alpha": result.selection.alpha,
        "stability": result.selection.stability,
        "tensors": "equal",
        "logits": vars(result.logits) if result.logits else None,
        "logits_skipped": result.logits_skipped,
        "warnings": list(result.notes),
    }


def _show(console: Console, result: job.PruneResult, target: str) -> None:
    console.print(summary(result.selection))
    share = result.bytes_after / result.bytes_before
    console.print(
        f"[bold]{result.path}[/bold]  {readable_size(result.bytes_before)} -> {readable_size(result.bytes_after)} "
        f"({share:.1%})"
    )
    console.print("Every tensor equals its slice of the original.")
    if result.logits is not None:
        console.print(
            f"Logits equal those of the masked original: KL {result.logits.mean_kl:.1e}, top-1 agreement "
            f"{result.logits.top1_agreement:.1%} over {result.logits.positions:,} positions."
        )
    if target == "stock":
        console.print("Loads in any tool that loads the original.")
    else:
        console.print(
            "Loads in Transformers after `import shape_moe`, or with trust_remote_code=True; for a checkpoint that any "
            "tool loads, prune with --target stock (equal counts, rerouted)."
        )
