"""What is shown of pruned models: as JSON, and what terminals say of one or of a series."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from shape_moe.cli.console import plain_table, show_commands
from shape_moe.reporting.series import HEADINGS
from shape_moe.units import readable_share

if TYPE_CHECKING:
    from shape_moe.jobs.prune import PruneResult
    from shape_moe.jobs.prune_series import SeriesResult


def pruned_document(result: PruneResult) -> dict[str, Any]:
    """One model as JSON."""
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
        "target": result.target,
        "choice": result.selection.choice,
        "refit": result.selection.refit,
        "judgement": result.judgement.to_document() if result.judgement else None,
        "rejected": result.rejected,
        "opening": result.opening.lines() if result.opening else [],
        "next": list(result.following),
        "warnings": list(result.notes),
    }


def series_document(result: SeriesResult) -> dict[str, Any]:
    """A series as JSON: what there is to say of each model, largest first."""
    models = [pruned_document(model) for model in result.models]
    return {"series": str(result.path), "models": models, "warnings": list(result.notes)}


def show_series(console: Console, result: SeriesResult) -> None:
    """The models side by side, then what to type next for each."""
    table = plain_table(*HEADINGS)
    for model in result.series.models:
        table.add_row(*model.cells())
    console.print()
    console.print(f"[bold]{escape(str(result.path))}[/bold]")
    console.print(table)
    compared = all(model.logits is not None for model in result.models)
    console.print(_equal(any(model.selection.refit is not None for model in result.models)), markup=False)
    if compared:
        console.print("Logits equal those of the masked original, for each model.", markup=False)
    console.print(checked_lines(result.models[0])[-1], markup=False)
    console.print("Next:", markup=False)
    show_commands(console, dict.fromkeys(command for model in result.models for command in model.following))


def checked_lines(result: PruneResult) -> list[str]:
    """What is known to be equal, and where the result loads."""
    lines = [_equal(result.selection.refit is not None)]
    if result.logits is not None:
        lines.append(
            f"Logits equal those of the masked original: KL {result.logits.mean_kl:.1e}, top-1 agreement "
            f"{readable_share(result.logits.top1_agreement)} over {result.logits.positions:,} positions."
        )
    lines.append(
        "Loads in any tool that loads the original."
        if result.target == "stock"
        else "Loads in Transformers after `import shape_moe`, or with trust_remote_code=True; for a checkpoint that "
        "any tool loads, prune with --target stock (equal counts, rerouted)."
    )
    return lines


def _equal(refitted: bool) -> str:  # read at the call
    """What is known of the tensors."""
    but = " but the kept experts' refitted down projections" if refitted else ""
    return f"Every tensor{but} equals its slice of the original."
