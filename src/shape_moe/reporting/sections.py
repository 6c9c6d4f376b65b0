"""The report's sections: each one is there when its data are, and says otherwise what would add it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shape_moe.evaluation.swept import Sweep
from shape_moe.reporting.choice import choice_section, curves_figure
from shape_moe.reporting.demo_rows import demo_levels
from shape_moe.reporting.experiment_tables import STARRED, experiment_gaps, experiment_parts
from shape_moe.reporting.figures.agreement import agreement_figure
from shape_moe.reporting.figures.coalitions import (
    MOST_SHOWN,
    co_activations,
    lost_figure,
    matrix_figure,
    pairs_figure,
)
from shape_moe.reporting.figures.coverage import coverage_figure
from shape_moe.reporting.figures.evaluation import (
    faithfulness_figure,
    footprint_figures,
    quality_figure,
    result_tables,
)
from shape_moe.reporting.figures.figure import Section, Table, sentence
from shape_moe.reporting.figures.layers import layer_figure
from shape_moe.reporting.figures.sizes import demo_figure, evaluation_size_figure, experiment_figure
from shape_moe.reporting.figures.sweep import sweep_figure
from shape_moe.reporting.figures.values import heat_map
from shape_moe.reporting.material import Material
from shape_moe.selection.agreement import kept_by_scorer
from shape_moe.selection.selection import Selection
from shape_moe.text import one_line
from shape_moe.units import capitalised, kl_at_least, percent, readable_kl, readable_share, readable_size

_SHOWN = 100
"""Characters of an answer that are shown."""


@dataclass(frozen=True)
class Missing:
    """A section that was left out.

    Attributes:
        title: its heading.
        commands: what would add it.
    """

    title: str
    commands: tuple[str, ...]


COSTS = frozenset({"sweep", "sizes", "quality", "experiment", "demo", "forgotten", "footprint"})
"""Sections that say what pruning costs: they come before those that say what was kept and why."""


def sections(material: Material) -> tuple[list[Section], list[Missing]]:
    """Build what can be built.

    Returns:
        The sections in their order, and those that were left out.
    """
    found: list[Section] = []
    missing: list[Missing] = []
    for build in _BUILDERS:
        built = build(material)
        if isinstance(built, Section):
            found.append(built)
        elif built is not None:
            missing.append(built)
    return found, [] if material.experiment is not None else _together(missing)


def _together(missing: list[Missing]) -> list[Missing]:
    """What the same commands add, as one."""
    titles: dict[tuple[str, ...], list[str]] = {}
    for entry in missing:
        titles.setdefault(entry.commands, []).append(entry.title)
    return [Missing(capitalised(", ".join(names).lower()), commands) for commands, names in titles.items()]


def _trace_commands(material: Material) -> tuple[str, str]:
    selection = " --selection SELECTION" if material.selection is not None else ""
    trace = f"shape-moe trace {material.model_word} --data TASK.jsonl -o TRACE"
    return trace, f"shape-moe report TRACE{selection}"


def _report_command(material: Material, option: str) -> str:
    return f"shape-moe report {shlex.quote(material.source)} {option}"


def _values(material: Material) -> Section | Missing:
    scores, selection = material.scores, material.selection
    if scores is None and selection is None:
        return Missing("Expert values", _trace_commands(material))
    if scores is None:
        lead = "Each row is a layer and each cell an expert; coloured experts are kept, grey ones are removed."
        title = "Kept experts"
    else:
        by = "the table of values" if scores.scorer == "table" else f"the scorer {scores.scorer}"
        title = "Expert values"
        lead = f"Each row is a layer and each cell an expert: the stronger its colour, the more {by} finds it worth"
        lead += "; kept experts are coloured, removed ones grey." if selection else "."
        lead += " Choose a row to see that layer below."
    return Section("values", title, lead, (heat_map(scores, selection),))


def _layers(material: Material) -> Section | Missing:
    selection, mass = material.selection, material.kept_mass
    if selection is None or mass is None:
        source = material.source if material.trace is not None or material.scores is not None else "TRACE"
        select = f"shape-moe select {shlex.quote(source)} --keep 0.8 -o selection.json"
        return Missing("What every layer keeps", (select, _report_command(material, "--selection selection.json")))
    lead = (
        "Bars show how many experts every layer keeps, diamonds above them how much of the layer's value these hold: a "
        "low bar with a high diamond is a layer that needs few experts."
    )
    figures = [layer_figure(selection, mass)]
    if material.curves is not None and material.curves.covers(selection):
        figures.append(curves_figure(material.curves, selection))
    return Section("layers", "Layers", lead, tuple(figures))


def _coverage(material: Material) -> Section | Missing:
    if material.scores is None:
        return Missing("Coverage curves", _trace_commands(material))
    lead = (
        "The curve climbs as experts are added from the most valuable one on: the steeper it rises, the fewer experts "
        "carry the chosen layer; thin lines are the other layers."
    )
    notes = (_about_alpha(material.selection),) if material.selection is not None else ()
    figure = coverage_figure(material.scores, material.selection, material.kept_mass)
    return Section("coverage", "Coverage", lead, (figure,), notes=notes)


def _about_alpha(selection: Selection) -> str:
    alpha = selection.alpha
    if alpha is None:
        return "This selection was not made by one alpha for all layers, so there is no common line."
    if alpha > 1:
        return "Every expert of value is kept, and some without: no share of value describes the selection."
    return (
        f"One alpha for all layers, {percent(alpha)}: every layer keeps its best experts until their value reaches "
        "the dashed line."
    )


def _coalitions(material: Material) -> Section | Missing:
    trace, selection, lost = material.trace, material.selection, material.lost_shares
    if trace is None:
        return Missing("Coalitions", _trace_commands(material))
    layers = co_activations(trace, material.weights)
    figures = [matrix_figure(layers, selection), pairs_figure(layers, selection)]
    if lost is not None:
        figures.insert(0, lost_figure(trace.info.layers, lost))
    lead = (
        "A token is served by a coalition of experts; the matrix shows which experts of the chosen layer meet more "
        "often (warm) or less often (cool) than their traffic alone suggests, and the bars name the closest pairs."
    )
    notes = [
        "In the matrix, experts that often meet stand side by side. Pairs are in the order of how clearly they exceed "
        "what their traffic suggests."
    ]
    if selection is not None:
        notes.insert(0, "In the matrix, kept experts come first, and lines separate them from the removed ones.")
    if trace.info.num_experts > MOST_SHOWN:
        notes.append(f"The matrix shows the {MOST_SHOWN} experts with most tokens; bars and tables count all.")
    return Section("coalitions", "Coalitions", lead, tuple(figures), notes=tuple(notes))


def _agreement(material: Material) -> Section | Missing:
    if len(material.rivals) < 2:
        return Missing("Agreement between scorers", _trace_commands(material))
    selection = material.selection
    masks = {}
    if selection is not None and material.trace is not None:
        masks = kept_by_scorer(material.rivals, selection, material.trace.info.routing)
    how = f"{selection.kept:,} experts by the rule {selection.rule}" if selection is not None else ""
    lead = (
        "Each cell compares two ways to value experts on the same trace: 1 means that they agree; random values "
        "show what agreement by chance looks like."
    )
    return Section(
        "agreement", "Agreement between scorers", lead, (agreement_figure(list(material.rivals), masks, how),)
    )


def _sweep(material: Material) -> Section | Missing:
    sweep = material.sweep
    if sweep is None or not sweep.points:
        command = f"shape-moe sweep {material.model_word} --trace TRACE -o SWEEP"
        return Missing("Quality against size", (command, _report_command(material, "--sweep SWEEP")))
    lead = "Each point is the model with one selection: the further left, the smaller."
    notes = tuple(sentence(text) for text in (sweep.reason, _smaller(sweep), sweep.split) if text)
    return Section("sweep", "Quality against size", lead, (sweep_figure(sweep, material.selection),), notes=notes)


def _smaller(sweep: Sweep) -> str:
    """What is within the limit and yet not recommended."""
    place = sweep.smallest_within_limit
    if place is None or place == sweep.recommended:
        return ""
    point = sweep.points[place]
    return f"The smallest selection within the limit keeps {percent(point.keep)} of the experts ({point.method})"


def _sizes(material: Material) -> Section | None:
    evaluation = material.evaluation
    figure = evaluation_size_figure(evaluation) if evaluation is not None and material.sweep is None else None
    if figure is None:
        return None
    lead = "Each point is a model with the share of experts that it keeps: the further left, the smaller."
    return Section("sizes", "Quality against size", lead, (figure,))


def _experiment(material: Material) -> Section | None:
    document = material.experiment
    if document is None:
        return None
    parts = experiment_parts(document)
    figures = [experiment_figure(part, place) for place, part in enumerate(parts, start=1) if part.tables]
    tables = [
        Table(
            f"{part.model}, {part.evaluation}: {table.title}", table.headings, tuple(_texts(row) for row in table.rows)
        )
        for part in parts
        for table in part.tables
    ]
    notes = [STARRED]
    notes += [f"{part.model}: {part.sizes}" for part in parts if part.model_first]
    notes += [f"{part.model}, {part.evaluation}: {part.sample}" for part in parts]
    notes += [f"Not possible: {reason}." for reason in experiment_gaps(document)]
    lead = "Each line is a method: the higher it stays when fewer experts are kept (or the lower its KL), the better."
    return Section("experiment", "Quality against size", lead, tuple(figures), tuple(tables), tuple(notes))


def _texts(row: tuple[Any, ...]) -> tuple[str, ...]:
    name, *cells = row
    return (str(name), *(cell.marked for cell in cells))


def _demo(material: Material) -> Section | None:
    document = material.demo
    if document is None:
        return None
    rows = tuple(
        (str(row["scorer"]), readable_share(keep), readable_size(row["size"]), *_rights(row))
        for keep, found in demo_levels(document)
        for row in found
    )
    headings = ("Scorer", "Kept", "Weights", str(document["task"]), "Other tasks")
    lead = (
        f"Each line is a way to value experts, calibrated on {document['task']}: that task is to be kept, the others "
        "may fade."
    )
    table = Table("Exact match on held-out prompts, by every scorer", headings, rows)
    return Section("demo", "Quality against size", lead, (demo_figure(document),), (table,))


def _rights(row: Mapping[str, Any]) -> tuple[str, str]:
    return readable_share(float(row["on_task"])), readable_share(float(row["off_task"]))


def _forgotten(material: Material) -> Section | None:
    models = material.evaluation.models if material.evaluation is not None else ()
    found = [(material.model_name, material.forgotten)] if material.forgotten is not None else []
    found += [(model.name, model.forgotten) for model in models if model.forgotten is not None]
    if not found:
        return None
    tables, notes = [], []
    for name, forgotten in found:
        kl = kl_at_least if forgotten.kl_is_bound else readable_kl
        rows = tuple(
            (group.name, f"{group.prompts}", kl(group.kl), *(f"{count}" for count in group.loops))
            for group in forgotten.groups
        )
        headings = ("Group", "Prompts", "KL to dense", "Dense loops", "Pruned loops")
        tables.append(Table(f"{name}: general prompts, worst group first", headings, rows))
        if forgotten.groups:
            worst = forgotten.groups[0]
            asked = {"Prompt": worst.worst.prompt, "Dense model": worst.worst.dense, "Pruned model": worst.worst.pruned}
            notes.append(f"{name}, for example {worst.name}:")
            notes += [f"{who}: {one_line(text)[:_SHOWN] or '(nothing)'}" for who, text in asked.items()]
    lead = (
        "Short prompts of many kinds that have nothing to do with the task, answered by both models. Skills that the "
        "task does not use are expected to fade; this decides no verdict."
    )
    return Section("forgotten", "What was forgotten", lead, (), tuple(tables), tuple(notes))


def _evaluate_commands(material: Material) -> tuple[str, str]:
    evaluate = f"shape-moe evaluate {material.model_word} PRUNED --data HELD_OUT.jsonl -o evaluation.json"
    return evaluate, _report_command(material, "--evaluation evaluation.json")


def _quality(material: Material) -> Section | Missing:
    evaluation = material.evaluation
    figure = quality_figure(evaluation) if evaluation is not None else None
    if evaluation is None or figure is None:
        return Missing("Quality beside the dense model", _evaluate_commands(material))
    figures = [figure, *(faithfulness_figure(check, i) for i, check in enumerate(evaluation.faithfulness, start=1))]
    lead = "Each row is a model, measured on the same examples: where two intervals lie apart, the models differ."
    notes = (f"Measured on {evaluation.data}.",) if evaluation.data else ()
    return Section("quality", "Quality", lead, tuple(figures), result_tables(evaluation), notes)


def _footprint(material: Material) -> Section | Missing:
    evaluation = material.evaluation
    if evaluation is None or not any(model.footprint for model in evaluation.models):
        measured, shown = _evaluate_commands(material)
        return Missing("Memory and speed", (f"{measured} --footprint", shown))
    devices = list(dict.fromkeys(model.footprint.device for model in evaluation.models if model.footprint))
    lead = (
        "Bars compare what the models take and how fast they are on the same machine; the grey bar is the dense model."
    )
    notes = (f"Measured on {', '.join(devices)}.",) if devices else ()
    return Section("footprint", "Memory and speed", lead, footprint_figures(evaluation), notes=notes)


_BUILDERS: tuple[Callable[[Material], Section | Missing | None], ...] = (
    _sweep,
    _sizes,
    _experiment,
    _demo,
    _quality,
    _footprint,
    _forgotten,
    choice_section,
    _layers,
    _values,
    _agreement,
    _coverage,
    _coalitions,
)
