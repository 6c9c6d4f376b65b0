"""The top of the report: what was kept in numbers, what that means in plain words, and what to beware of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shape_moe.evaluation.evaluated import ALSO
from shape_moe.evaluation.forgotten import Forgotten
from shape_moe.evaluation.measures import HEALTH_LIMIT, Measured
from shape_moe.reporting.experiment_tables import experiment_preface
from shape_moe.reporting.figures.figure import sentence
from shape_moe.reporting.figures.metrics import METRICS, known_metrics
from shape_moe.reporting.material import Material
from shape_moe.reporting.story import is_selected, shrunk
from shape_moe.selection.selection import Selection
from shape_moe.units import counted, percent, readable_share, readable_size

_FIRM, _FAIR = 0.95, 0.9


@dataclass(frozen=True)
class Tile:
    """One number of the summary.

    Attributes:
        label: what it is.
        value: the number.
        detail: what belongs to it.
        share: a share to draw as a bar, None for none.
    """

    label: str
    value: str
    detail: str
    share: float | None = None


def headline(material: Material) -> str:
    """The page's heading."""
    if material.demo is not None:
        return f"Demo: {material.demo['task']} with fewer experts"
    if material.selection is not None:
        return f"{material.model_name} with {readable_share(material.selection.keep)} of its experts"
    if material.experiment is not None:
        return f"Experiment on {', '.join(_models(material))}"
    if material.sweep is not None:
        return f"{material.model_name}: quality at every size"
    if material.evaluation is not None:
        count = sum(model.kind != "dense" for model in material.evaluation.models)
        return f"{material.model_name} beside {counted(count, 'pruned model')}"
    return f"{material.model_name}: what its experts are worth"


def subline(material: Material) -> str:
    """The sentence below the heading."""
    if material.opening is not None:
        return material.opening.method
    if material.experiment is not None:
        return experiment_preface(material.experiment)
    if material.demo is not None:
        return f"Calibrated on {material.demo['task']}; exact match on prompts that were not used for calibration."
    if material.sweep is not None:
        return sentence(material.sweep.reason)
    if material.evaluation is not None:
        return f"Judged by {_judged_by(material)}."
    return "Nothing is selected yet: this report shows what the experts are worth."


def joint_headline(materials: Sequence[Material]) -> str:
    """The heading of a page on several models."""
    names = dict.fromkeys(name for material in materials for name in _models(material))
    return f"{counted(len(materials), 'result')} on {', '.join(names)}"


def _models(material: Material) -> list[str]:
    if material.experiment is not None:
        return [str(entry["name"]) for entry in material.experiment["models"]]
    return [material.model_name]


def joint_subline(materials: Sequence[Material]) -> str:
    """What such a page shows, one after the other."""
    return f"{'; '.join(headline(material) for material in materials)}."


def _judged_by(material: Material) -> str:
    evaluation = material.evaluation
    assert evaluation is not None
    if evaluation.data is None:
        return "benchmark tasks"
    return f"{counted(evaluation.examples, 'example')} of {evaluation.data}" if evaluation.examples else evaluation.data


def tiles(material: Material) -> list[Tile]:
    """The numbers of the summary, most important first."""
    found = []
    selection, sizes = material.selection, material.sizes
    if selection is not None:
        found.append(
            Tile(
                "Experts kept",
                f"{selection.kept:,} of {selection.total:,}",
                f"{percent(selection.keep)}; {percent(selection.keep_asked)} were asked for",
                selection.keep,
            )
        )
    if sizes is not None:
        share = sizes.after / sizes.before
        found.append(Tile("Weights", shrunk(sizes), f"{percent(share)} of the original ({sizes.origin})", share))
    mass = material.kept_mass
    if mass is not None and np.isfinite(mass).any():
        mean, low = float(np.nanmean(mass)), percent(float(np.nanmin(mass)))
        found.append(
            Tile(
                "Value kept",
                percent(mean),
                f"by the scorer, no measure of quality; {low} in the lowest",
                mean,
            )
        )
    found += _quality_tiles(material)
    if selection is not None and selection.stability is not None:
        agreement, undecided = selection.stability["agreement"], selection.stability["undecided"]
        found.append(
            Tile(
                "Halves agree",
                percent(agreement),
                f"halves of the data fill {counted(undecided, 'place')} differently",
                agreement,
            )
        )
    if selection is None and material.trace is not None:
        info = material.trace.info
        tokens = sum(info.tokens.values())
        found.append(Tile("Traced", f"{tokens:,.0f} tokens", f"{info.examples:,} examples"))
    if selection is None and material.scores is not None:
        layers, experts = material.scores.values.shape
        found.append(Tile("Experts", f"{layers * experts:,}", f"{layers} layers of {experts}"))
    return found


def _quality_tiles(material: Material) -> list[Tile]:
    measured = measured_quality(material)
    if measured is None:
        return []
    result = measured[0]
    metric = next(iter(known_metrics([result])), METRICS[0])
    estimate = metric.of(result)
    if estimate is None:
        return []
    detail = f"{metric.better} is better"
    if estimate.has_interval:
        detail = f"95 % interval {metric.shown(estimate.low)} to {metric.shown(estimate.high)}; {detail}"
    return [Tile(metric.title, metric.shown(estimate.value), detail)]


def measured_quality(material: Material) -> tuple[Measured, str] | None:
    """The selection's quality, and on what it was measured: from the sweep, else from the evaluation."""
    if material.sweep is not None:
        point = material.sweep.point_of(material.selection)
        if point is not None:
            return point.measured, material.sweep.split
    if material.evaluation is not None and material.selection is not None:
        for model in material.evaluation.models:
            if is_selected(model, material.selection) and "task" in model.sets:
                return model.sets["task"], f"Measured on {material.evaluation.data}."
    return None


def meaning(material: Material) -> list[str]:
    """What the selection means, one paragraph per thought."""
    selection = material.selection
    if selection is None:
        return []
    texts = [_what_goes(selection, material), _routing(selection)]
    texts += [_value(selection, material), _stability(selection), _quality(material)]
    return [text for text in texts if text]


def _what_goes(selection: Selection, material: Material) -> str:
    counts = sorted(len(ids) for ids in selection.layers.values())
    gone = selection.total - selection.kept
    where = f"{counts[0]}" if counts[0] == counts[-1] else f"between {counts[0]} and {counts[-1]}"
    text = (
        f"{gone:,} experts leave the model for good; every layer keeps {where} of its {selection.num_experts}. "
        "Attention, embeddings and shared experts stay as they are."
    )
    if material.sizes is not None:
        saved = material.sizes.before - material.sizes.after
        text += f" That frees {readable_size(saved)}, {percent(saved / material.sizes.before)} of the weights."
    return text


def _routing(selection: Selection) -> str:
    if selection.routing == "reroute":
        text = "The router forgets removed experts too: a token still gets its full number, the best of those kept."
        if selection.gate_scale == "trained":
            text += " Their weights keep the size that the model was trained with (gate scale trained)."
        return text
    return (
        "The router stays as it is: where it picks a removed expert, that expert adds nothing and no other "
        "expert takes its place, so the model also computes less."
    )


def _value(selection: Selection, material: Material) -> str:
    mass, lost = material.kept_mass, material.lost_shares
    text = ""
    if mass is not None and np.isfinite(mass).any():
        worst, typical = list(selection.layers)[int(np.nanargmin(mass))], percent(float(np.nanmean(mass)))
        low = percent(float(np.nanmin(mass)))
        where = (
            "in every layer"
            if low == typical
            else f"in the mean over layers, and {low} in layer {worst}, which loses most"
        )
        text = f"The kept experts hold {typical} of the value {where}."
    if lost is not None:
        mean = float((lost @ np.arange(lost.shape[1])).mean())
        text += (
            f" In calibration, a token at a layer kept all of its {lost.shape[1] - 1} experts in "
            f"{percent(float(lost[:, 0].mean()))} of cases and lost {mean:.2f} of them on average."
        )
    return text.strip()


def _stability(selection: Selection) -> str:
    if selection.stability is None:
        return ""
    agreement = selection.stability["agreement"]
    measured = "little" if agreement >= _FIRM else "somewhat" if agreement >= _FAIR else "a lot"
    return (
        f"Each half of the calibration data alone would choose {percent(agreement)} of the same experts: other "
        f"examples of the same kind would change the selection {measured}."
    )


def _quality(material: Material) -> str:
    measured = measured_quality(material)
    if material.verdict is not None:
        return ""
    if measured is None:
        return (
            "Nothing here says how good the pruned model is. What the calibration examples do not show may be gone: "
            "judge it by examples that were not used for calibration, with shape-moe evaluate."
        )
    result, where = measured
    told = "; ".join(f"{metric.title.lower()} {metric.text(result)}" for metric in known_metrics([result])[:3])
    return f"Measured quality, with 95 % intervals: {told.replace('kl to', 'KL to')}. {sentence(where)}"


def warnings(material: Material) -> list[str]:
    """What a reader must not miss."""
    found = [*_lost_elsewhere(material), *_of_sweep(material)]
    if material.evaluation is not None:
        found[:0] = material.evaluation.warnings
    found += material.selection.warnings if material.selection is not None else ()
    found += material.remarks
    return list(dict.fromkeys(sentence(text) for text in found))


def _lost_elsewhere(material: Material) -> list[str]:
    """What is surely lost on other data, and general prompts that end in a loop."""
    found = []
    evaluation = material.evaluation
    for model in evaluation.models if evaluation is not None else ():
        change = model.sets[ALSO].change.get("exact_match") if ALSO in model.sets else None
        if evaluation is not None and change is not None and change.has_interval and change.high < 0:
            low, high = (readable_share(-end) for end in (change.high, change.low))
            found.append(f"{model.name} on {evaluation.also}: right answers fall by {low} to {high} (95 % interval).")
        found += _loops(model.name, model.forgotten)
    return found + _loops(material.pruned_name, material.forgotten)


def _loops(name: str, forgotten: Forgotten | None) -> list[str]:
    groups = forgotten.groups if forgotten is not None else ()
    counts = [(max(group.loops[1] - group.loops[0], 0), group.prompts) for group in groups]
    more, asked = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    if more <= HEALTH_LIMIT * asked:
        return []
    return [
        f"{name}, off the task: of {asked} answers to general prompts, {more} more end in a loop than with the dense "
        "model."
    ]


def _of_sweep(material: Material) -> list[str]:
    sweep = material.sweep
    if sweep is None:
        return []
    found = []
    point = sweep.point_of(material.selection)
    if sweep.recommended is None:
        found.append(sentence(f"The sweep recommends no selection. {sweep.reason}"))
    if point is not None and point.meets is False:
        found.append("The selection does not meet the limit on quality that the sweep was given.")
    if point is not None and point.measured.health is not None and point.healthy is False:
        found.append(f"The selection's free answers are not healthy: {'; '.join(point.measured.health.complaints)}.")
    if point is not None and point.fits is False:
        found.append("The selection does not fit the device that the sweep was given.")
    return found
