"""What an evaluation shows on a terminal: the verdict on every model, then all figures."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from shape_moe.cli.console import plain_table
from shape_moe.cli.estimates import kl, number, points, share
from shape_moe.evaluation.evaluated import TASK, Chosen, Evaluated, Evaluation
from shape_moe.evaluation.faithfulness import Faithfulness
from shape_moe.evaluation.measures import Measured, worst_group
from shape_moe.reporting.opening import evaluated_line, short_name
from shape_moe.units import readable_share, readable_size


def show_evaluation(console: Console, result: Evaluation, *, by_pattern: bool) -> None:
    """Show what was found out.

    Args:
        console: where.
        result: the evaluation.
        by_pattern: whether exact match is that of free answers, of which only a part must be right.
    """
    for found in result.models:
        if found.verdict is not None:
            console.print(evaluated_line(found, result.models[0].size), markup=False)
            lines = [*found.verdict.lines(), *(found.forgotten.lines() if found.forgotten else ())]
            for line in lines:
                console.print(Padding(Text(line), (0, 0, 0, 2), expand=False))
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
            change = f"{figure.replace('_', ' ')} {points(lost) if figure == 'exact_match' else number(lost, 4)}"
            console.print(f"{found.name}: worst class is {name!r} ({change})", markup=False)
    for check in result.faithfulness:
        _show_faithfulness(console, check)


def _show_set(console: Console, result: Evaluation, name: str, *, by_pattern: bool) -> None:
    """A row per figure and a column per model, so that few models fit a narrow terminal."""
    source = result.data if name == TASK else result.also
    columns = [_figures(found.sets[name], by_pattern=by_pattern) for found in result.models]
    shown = [figure for figure in columns[0] if any(figures[figure] for figures in columns)]
    shapes = [shape for found in result.models if found.selection and (shape := Chosen.of(found.selection).shape)]
    title = f"{source}: figures with 95 % intervals{f' ({shapes[0]})' if shapes else ''}"
    table = plain_table("", *(short_name(found.name) for found in result.models), title=title)
    for figure in shown:
        table.add_row(figure, *(figures[figure] for figures in columns))
    console.print(table)


def _figures(measured: Measured, *, by_pattern: bool) -> dict[str, str]:
    """Every figure of a model on a set, empty where it was not taken."""
    quality, change, health = measured.quality, measured.change, measured.health
    exact, changed = quality.get("exact_match"), change.get("exact_match")
    if by_pattern and health is not None:
        exact, changed = health.figures["exact_match"], health.change.get("exact_match")
    answers = health.figures if health is not None else {}
    return {
        "nll": number(quality["nll"], 4),
        "perplexity": number(quality["perplexity"], 3),
        "KL to dense": kl(quality["kl"]) if change else "",
        "same top-1": share(quality["top1"]) if change else "",
        "exact match": share(exact) if exact else "",
        "change, points": points(changed) if changed else "",
        "answers that loop": readable_share(answers["loop_rate"].value) if answers else "",
        "answers without end": readable_share(answers["no_end_rate"].value) if answers else "",
    }


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
        table.add_row(name, kl(verdict.quality["kl"]), number(verdict.quality["nll"], 4))
    console.print(table)
    console.print(
        "The selection beats every random one, and those beat its inversion: the values mean something."
        if check.faithful
        else "[yellow]The selection does not beat every random one, or those do not beat its inversion: the values "
        "mean little.[/yellow]"
    )
