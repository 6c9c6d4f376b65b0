"""The first screen of the report: how much smaller, what it cost by class, the verdict, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shape_moe.evaluation.evaluated import TASK, Evaluated, Evaluation
from shape_moe.evaluation.falls import Fall
from shape_moe.evaluation.measures import Measured
from shape_moe.evaluation.verdict import Verdict, Word
from shape_moe.evaluation.verdict_words import describe_answers, describe_calls
from shape_moe.reporting.demo_rows import demo_best, demo_command, demo_headings, demo_headline, demo_short
from shape_moe.reporting.experiment_tables import experiment_bests, experiment_sizes
from shape_moe.reporting.figures.figure import sentence
from shape_moe.reporting.material import Material, Sizes
from shape_moe.reporting.opening import evaluated_line, next_commands, smaller
from shape_moe.reporting.provenance import calibration_options
from shape_moe.selection.method import Method
from shape_moe.selection.selection import Selection
from shape_moe.units import (
    NONE,
    capitalised,
    counted,
    kl_at_least,
    readable_kl,
    readable_share,
    readable_size,
    share_at_most,
)

COST_HEADINGS = ("", "Dense", "Pruned", "Lost", "At most", "KL to dense", "Examples")
"""Of the table of what pruning cost; the first column names the class and the figure."""
_TONES = {
    Word.SAFE: "good",
    Word.NO_LOSS: "fair",
    Word.LOSS: "warn",
    Word.DAMAGED: "bad",
    Word.NOT_MEASURED: "unknown",
}
_MOST_CLASSES = 6
_MOST_ROWS = 8


@dataclass(frozen=True)
class Story:
    """What is to be known of one pruned model.

    Attributes:
        name: the model.
        smaller: how much smaller it is, in a few words.
        detail: sizes and experts.
        headings: of the table of what it cost.
        costs: rows of what it cost, the worst class first.
        more: classes that the rows leave out, in words; empty where none is.
        word: the verdict.
        tone: how the verdict looks: ``good``, ``fair``, ``warn``, ``bad`` or ``unknown``.
        reason: why.
        details: free answers, tool calls, and what the verdict leaves out.
        advice: what to do next, a sentence.
        commands: what to type for it.
        method: how it was made, a sentence; empty where the page's first line says it.
    """

    name: str
    smaller: str
    detail: str
    headings: tuple[str, ...]
    costs: tuple[tuple[str, ...], ...]
    more: str
    word: str
    tone: str
    reason: str
    details: tuple[str, ...]
    advice: str
    commands: tuple[str, ...] = ()
    method: str = ""


def stories(material: Material) -> list[Story]:
    """One story for the selection that the report is about, and one for every other model that was judged."""
    evaluation, found = material.evaluation, []
    pruned = [model for model in evaluation.models if model.kind != "dense"] if evaluation is not None else []
    own = next((model for model in pruned if is_selected(model, material.selection)), None)
    if material.demo is not None:
        found.append(_of_demo(material.demo))
    elif material.selection is not None or material.verdict is not None:
        found.append(_of_selection(material, own))
    elif material.sweep is not None:
        found.append(_of_sweep(material))
    elif material.experiment is not None:
        found += _of_experiment(material.experiment)
    dense = evaluation.models[0].size if evaluation is not None and evaluation.models else None
    return found + [_of_model(material, evaluation, m, dense) for m in pruned if evaluation and m is not own]


def _of_demo(document: Mapping[str, Any]) -> Story:
    best = demo_best(document)
    smaller = f"{readable_share(best.saved)} smaller" if best is not None else "No method keeps the task"
    detail = f"{demo_headline(document)}."
    word = Word.NOT_MEASURED
    return Story(
        "The embedded model",
        smaller,
        detail,
        demo_headings(document),
        tuple(demo_short(document)),
        "",
        str(word),
        _TONES[word],
        "A demonstration: the best of many methods on a few prompts looks a little better than it is.",
        (),
        "Do it with your own model and examples; the command ends with a verdict.",
        (demo_command(document),),
    )


def _of_experiment(document: Mapping[str, Any]) -> list[Story]:
    found, word = [], Word.NOT_MEASURED
    for model in document["models"]:
        name, bests = str(model["name"]), experiment_bests(document, str(model["name"]))
        sizes = [best.saved for best in bests if best.saved is not None]
        smaller = f"Up to {readable_share(max(sizes))} smaller" if sizes else "Sizes not known"
        prune = f"shape-moe prune {shlex.quote(str(model.get('model') or name))} --data TASK.jsonl"
        commands = tuple(f"{prune} {bests[0].options} -o SMALLER" for _ in bests[:1])
        found.append(
            Story(
                name,
                smaller,
                experiment_sizes(document, name),
                ("Evaluation", "Kept", "Best method", "Dense", "Pruned"),
                tuple(best.cells for best in bests[:_MOST_ROWS]),
                "The tables below hold the others." if len(bests) > _MOST_ROWS else "",
                str(word),
                _TONES[word],
                "Many methods were compared on these examples, and the best of many looks a little better than it is.",
                (),
                "Prune by the method that is best at the keep rate that you need; the command ends with a verdict.",
                commands,
            )
        )
    return found


def is_selected(model: Evaluated, selection: Selection | None) -> bool:
    """Whether a model that was evaluated is this selection's."""
    chosen = model.selection
    if chosen is None or selection is None or abs(chosen.keep - selection.keep) >= 0.5 / selection.total:
        return False
    return all(getattr(chosen, key) == getattr(selection, key) for key in ("scorer", "rule", "routing", "gate_scale"))


def shrunk(sizes: Sizes) -> str:
    """Both sizes, with the unit once where it is the same."""
    space = "\N{NO-BREAK SPACE}"
    (before, unit), (after, unit_after) = (readable_size(size).split(" ") for size in (sizes.before, sizes.after))
    return f"{before}{f'{space}{unit}' * (unit != unit_after)}{space}→ {after}{space}{unit_after}"


def _smaller(sizes: Sizes | None, keep: float | None) -> tuple[str, str]:
    """How much smaller in a few words, and both sizes."""
    if sizes is not None and sizes.before > 0:
        return smaller(int(sizes.before), int(sizes.after)), shrunk(sizes)
    if keep is not None:
        return f"{readable_share(1 - keep)} of the experts removed", ""
    return "Size not known", ""


def _of_selection(material: Material, own: Evaluated | None) -> Story:
    selection = material.selection
    verdict = material.verdict or (own.verdict if own is not None else None)
    word, _ = _smaller(material.sizes, selection.keep if selection is not None else None)
    detail = material.opening.size if material.opening is not None else ""
    name = material.pruned_name
    if verdict is not None:
        return _judged(name, word, detail, verdict, _commands(material, verdict))
    measured = own.sets.get(TASK) if own is not None else None
    point = material.sweep.point_of(selection) if material.sweep is not None else None
    if measured is None and point is not None:
        measured = point.measured
        reason = (
            "The examples of the sweep chose this selection, so its figures look a little better than the model is."
        )
    elif measured is not None:
        reason = "The evaluation holds figures but no verdict; another run of shape-moe evaluate gives one."
    else:
        reason = "Nothing here says what pruning did to the model."
    costs = _costs_of(measured)
    return _unjudged(name, word, detail, costs, reason, _commands(material, None))


def _of_sweep(material: Material) -> Story:
    sweep = material.sweep
    assert sweep is not None
    point = sweep.point_of(None)
    if point is None:
        reason = sentence(sweep.reason) or "No selection is recommended."
        return _unjudged(
            material.model_name, "Nothing recommended", "", (), reason, (), "Allow a larger loss, or keep more experts."
        )
    sizes = None
    if point.size is not None and sweep.dense_size is not None:
        sizes = Sizes(sweep.dense_size, point.size, "")
    smaller, size = _smaller(sizes, point.keep)
    detail = "; ".join(part for part in (size, f"{readable_share(point.keep)} of the experts kept") if part)
    reason = f"{sentence(sweep.reason)} The same examples chose it, so a verdict needs others."
    prune = f"shape-moe prune {material.model_word} --selection {_path(material.source, 'recommended.json')} -o SMALLER"
    commands = (prune, f"shape-moe evaluate {material.model_word} SMALLER --data OTHER_EXAMPLES.jsonl")
    advice = "Write the recommended model, and judge it by examples that the sweep has not seen."
    return _unjudged(
        f"{material.model_name}, {point.method}", smaller, detail, _costs_of(point.measured), reason, commands, advice
    )


def _path(source: str, name: str) -> str:
    folder = source.removesuffix("sweep.json").rstrip("/") or "."
    return shlex.quote(f"{folder}/{name}")


def _of_model(material: Material, evaluation: Evaluation, model: Evaluated, dense: int | None) -> Story:
    sizes = Sizes(dense, model.size, "") if dense and model.size else None
    word, _ = _smaller(sizes, model.selection.keep if model.selection is not None else None)
    detail = evaluated_line(model, dense)
    if model.verdict is not None:
        chosen = model.selection
        commands: tuple[str, ...] = ()
        if chosen is not None:
            method = Method.from_document(
                {key: getattr(chosen, key) for key in ("scorer", "rule", "routing", "gate_scale")}
            )
            original = material.model or "MODEL"
            commands = tuple(next_commands(original, model.name, model.verdict, keep=chosen.keep, method=method))
        return _judged(model.name, word, detail, model.verdict, commands)
    reason = "The evaluation holds no verdict on this model."
    if evaluation.data is None:
        reason = "Benchmark tasks alone give no verdict."
    again = f"shape-moe evaluate {material.model_word} {shlex.quote(model.name)} --data HELD_OUT.jsonl"
    return _unjudged(model.name, word, detail, _costs_of(model.sets.get(TASK)), reason, (again,))


def _judged(name: str, smaller: str, detail: str, verdict: Verdict, commands: tuple[str, ...]) -> Story:
    falls = verdict.falls
    rows = tuple(_cost(fall) for fall in falls[:_MOST_CLASSES])
    rest = len(falls) - len(rows)
    details = [line for outcome in verdict.outcomes if (line := describe_calls(outcome))]
    if verdict.answers is not None:
        details.append(f"{describe_answers(verdict.answers)}.")
    details += verdict.notes
    advice = verdict.advice or "Use it for what the examples show; other skills may be weaker."
    return Story(
        name,
        smaller,
        detail,
        COST_HEADINGS,
        rows,
        f"{counted(rest, 'class').replace('classs', 'classes')} that lost less are in the tables below."
        if rest
        else "",
        str(verdict.word),
        _TONES[verdict.word],
        verdict.reason,
        tuple(sentence(text) for text in details),
        advice,
        commands,
    )


def _unjudged(
    name: str,
    smaller: str,
    detail: str,
    costs: tuple[tuple[str, ...], ...],
    reason: str,
    commands: tuple[str, ...],
    advice: str = "Judge it by examples that it was not made from.",
) -> Story:
    word = Word.NOT_MEASURED
    headings = COST_HEADINGS
    return Story(name, smaller, detail, headings, costs, "", str(word), _TONES[word], reason, (), advice, commands)


def _cost(fall: Fall) -> tuple[str, ...]:
    dense, pruned = (readable_share(share) for share in fall.shares)
    lost = readable_share(fall.fall.value) if fall.fall.value >= 0 else f"gained {readable_share(-fall.fall.value)}"
    name = f"{fall.name}: {fall.figure}" if fall.name else capitalised(fall.figure)
    kl = NONE
    if fall.kl is not None:
        kl = kl_at_least(fall.kl) if fall.kl_is_bound else readable_kl(fall.kl)
    return name, dense, pruned, lost, share_at_most(max(fall.fall.high, 0.0)), kl, f"{fall.examples:,}"


def _costs_of(measured: Measured | None) -> tuple[tuple[str, ...], ...]:
    """What figures without a verdict say: the fall of exact match where it was taken, and the divergence."""
    if measured is None:
        return ()
    kl = measured.quality.get("kl")
    told = readable_kl(kl.value) if kl is not None else NONE
    exact, change = measured.quality.get("exact_match"), measured.change.get("exact_match")
    if exact is None or change is None:
        top = measured.quality.get("top1")
        if top is None:
            return ()
        high = share_at_most(max(1 - top.low, 0.0)) if top.has_interval else NONE
        same = readable_share(top.value)
        return (("Top-1 agreement", "100 %", same, readable_share(1 - top.value), high, told, NONE),)
    lost, high = -change.value, share_at_most(max(-change.low, 0.0)) if change.has_interval else NONE
    shown = readable_share(lost) if lost >= 0 else f"gained {readable_share(-lost)}"
    before, after = readable_share(exact.value - change.value), readable_share(exact.value)
    return (("Exact match", before, after, shown, high, told, NONE),)


def _commands(material: Material, verdict: Verdict | None) -> tuple[str, ...]:
    """What would make the model, or what is known of it, better."""
    selection, model = material.selection, material.model or "MODEL"
    data = calibration_options(material.trace.info) if material.trace is not None else None
    if selection is not None and (material.checkpoint or verdict is not None):
        pruned = material.source if material.checkpoint else "SMALLER"
        keep, method = selection.keep, selection.method
        return tuple(next_commands(model, pruned, verdict, keep=keep, method=method, data=data))
    file = _path(material.source, "recommended.json") if material.sweep is not None else "SELECTION.json"
    if material.source.endswith(".json") and material.sweep is None:
        file = shlex.quote(material.source)
    return (
        f"shape-moe prune {material.model_word} --selection {file} -o SMALLER",
        f"shape-moe evaluate {material.model_word} SMALLER --data HELD_OUT.jsonl",
    )
