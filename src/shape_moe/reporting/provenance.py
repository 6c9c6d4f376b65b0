"""Where a report's numbers come from: model, data, versions, seeds, and the commands that make them again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from shape_moe.calibration.example_maker import SPLIT_KEY, AnswerOptions
from shape_moe.calibration.presets import PREFIX
from shape_moe.reporting.figures.figure import sentence
from shape_moe.reporting.material import Material
from shape_moe.selection.agreement import scoring_of
from shape_moe.selection.selection import Selection
from shape_moe.tracing.trace import TraceInfo
from shape_moe.units import percent, readable_share

Facts = list[tuple[str, str]]


def facts(material: Material) -> list[tuple[str, Facts]]:
    """Groups of (name, value) pairs."""
    groups: list[tuple[str, Facts]] = [("Model", _model(material))]
    if material.trace is not None:
        groups.append(("Calibration", _calibration(material.trace.info)))
    if material.selection is not None:
        groups.append(("Selection", _selection(material.selection)))
    groups += [("Measurements", _measurements(material)), ("Versions", _versions(material))]
    return [(title, [(name, value) for name, value in pairs if value]) for title, pairs in groups]


def _model(material: Material) -> Facts:
    info, selection = material.trace.info if material.trace else None, material.selection
    known = info or selection
    sources = (info, selection, material.sweep, material.evaluation)
    prints = [source.fingerprint for source in sources if source is not None]
    fingerprint = next((text for text in prints if text), "unknown" if prints or material.scores else "")
    layers = material.layers
    experts = known.num_experts if known else material.scores.num_experts if material.scores else None
    return [
        ("Name", material.model or ""),
        ("Revision", (info.revision if info else None) or ""),
        ("Family", (known.family if known else None) or ""),
        ("MoE layers", f"{len(layers)} ({_spans(layers)})" if layers else ""),
        ("Experts per layer", str(experts) if experts else ""),
        ("Experts per token", str(known.top_k) if known and known.top_k else ""),
        ("Fingerprint", fingerprint),
    ]


def _spans(layers: tuple[int, ...]) -> str:
    """Layer indices as ranges."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in spans)


def _calibration(info: TraceInfo) -> Facts:
    tokens = " and ".join(f"{count:,.0f} {segment}" for segment, count in info.tokens.items())
    return [
        ("Data", ", ".join(str(source.get("data", "unknown")) for source in _sources(info))),
        ("Split", " ".join(sentence(str(s[SPLIT_KEY])) for s in _sources(info) if s.get(SPLIT_KEY))),
        ("Examples", f"{info.examples:,}" if info.examples else ""),
        ("Tokens", tokens),
        ("Engine", f"{info.engine}, {info.dtype}"),
        ("Seeds", ", ".join(str(source["seed"]) for source in _sources(info) if "seed" in source)),
        ("Answers from", ", ".join(str(s["answers_from"]) for s in _sources(info) if s.get("answers_missing"))),
        ("Content hash", ", ".join(str(s["content_hash"])[:19] for s in _sources(info) if s.get("content_hash"))),
    ]


def _selection(selection: Selection) -> Facts:
    rules = {
        name.replace("_", " "): value
        for name, value in selection.constraints.items()
        if value not in (None, [], {}, "", 1) and name not in ("budget_asked", "classes")
    }
    names = ", ".join(name or "(no class)" for name in selection.classes)
    return [
        ("Scorer", selection.scorer),
        ("Rule", selection.rule),
        ("Routing", selection.routing),
        ("Gate scale", selection.gate_scale if selection.gate_scale != "survivors" else ""),
        ("Keep rate", f"{percent(selection.keep)} ({readable_share(selection.keep_asked)} asked)"),
        ("Alpha", f"{selection.alpha:.4g}" if selection.alpha is not None and selection.alpha <= 1 else ""),
        ("Constraints", ", ".join(f"{name} {_short(value)}" for name, value in rules.items())),
        ("Classes", f"{names}; {'added up' if selection.pooled else 'joined by their maximum'}" if names else ""),
        ("Weights and seed", ", ".join(f"{name} {value:g}" for name, value in selection.options.items())),
    ]


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _measurements(material: Material) -> Facts:
    sweep, evaluation = material.sweep, material.evaluation
    found = [("Sweep", sweep.split), ("Sweep's seed", sweep.made_with.seed)] if sweep is not None else []
    if evaluation is not None:
        found += [("Evaluation", evaluation.data), ("Evaluation's seed", evaluation.made_with.seed)]
    if material.experiment is not None:
        found.append(("Experiment's seed", material.experiment["config"]["seed"]))
    if material.demo is not None:
        found.append(("Demonstration's seed", material.demo.get("seed")))
    return [(name, str(value)) for name, value in found if value is not None]


def _versions(material: Material) -> Facts:
    found: Facts = [("This report", f"shape-moe {version('shape-moe')}, plotly {version('plotly')}")]
    made = {
        "Trace": material.trace.info.versions if material.trace else {},
        "Sweep": material.sweep.made_with.versions if material.sweep else {},
        "Evaluation": material.evaluation.made_with.versions if material.evaluation else {},
    }
    made["Experiment"] = (material.experiment or {}).get("versions") or {}
    return found + [(name, ", ".join(f"{k} {v}" for k, v in versions.items())) for name, versions in made.items()]


def _sources(info: TraceInfo) -> list[Mapping[str, Any]]:
    return list(info.source.get("merged", [info.source]))


def commands(material: Material) -> list[str]:
    """Shell commands that make the artifacts of this report again."""
    model, sweep = material.model_word, material.sweep
    traced = _trace_commands(material.trace.info, model) if material.trace is not None else []
    measured = [result.made_with.command for result in (sweep, material.evaluation) if result is not None]
    if sweep is not None and sweep.made_with.command and sweep.recommends(material.selection):
        swept = sweep.made_with.command
        place = shlex.quote(f"{_value_of(swept, '-o') or 'SWEEP'}/recommended.json")
        if (trace := _value_of(swept, "--trace")) is not None:
            traced = [command.replace(" -o trace", f" -o {shlex.quote(trace)}") for command in traced]
        return [*traced, swept, f"shape-moe prune {model} --selection {place} -o pruned", *filter(None, measured[1:])]
    found = traced
    if material.selection is not None:
        source = "trace" if material.trace is not None else "values.csv"
        select = _select_command(material.selection, source)
        if select:
            found += [select, f"shape-moe prune {model} --selection selection.json -o pruned"]
    return [*found, *(command for command in measured if command)]


def _value_of(command: str, option: str) -> str | None:
    """What an option of a command was given, None where it was not."""
    words = shlex.split(command)
    return words[words.index(option) + 1] if option in words[:-1] else None


def calibration_options(info: TraceInfo) -> str | None:
    """The options that name the calibration examples of a trace again, None where they are not in one set of files."""
    sources = _sources(info)
    if len(sources) != 1 or "content_hash" not in sources[0] or sources[0].get("in_memory"):
        return None
    return _data_options(sources[0])


def _trace_commands(info: TraceInfo, model: str) -> list[str]:
    """Empty when the verb trace did not make it of files, or drew its examples together with held-out ones."""
    sources = _sources(info)
    if not all("content_hash" in source and not source.get(SPLIT_KEY) for source in sources):
        return []
    if any(source.get("in_memory") for source in sources):
        return []
    names = ["trace"] if len(sources) == 1 else [f"trace-{place}" for place in range(1, len(sources) + 1)]
    made = [
        f"shape-moe trace {model} {_data_options(source)}{_engine(info)} -o {name}"
        for source, name in zip(sources, names, strict=True)
    ]
    if len(sources) > 1:
        weights = "".join(f" --weight {source.get('weight', 1):g}" for source in sources)
        made.append(f"shape-moe merge {' '.join(names)}{weights} -o trace")
    return made


def _engine(info: TraceInfo) -> str:
    return "" if info.engine == "transformers" else f" --engine {shlex.quote(info.engine)}"


def _data_options(source: Mapping[str, Any]) -> str:
    sources = source.get("sources") or [source["data"]]
    options: list[tuple[str, Any]] = [("--data", name) for name in sources]
    options += [("--weight", f"{weight:g}") for weight in source.get("weights") or ()]
    options += [("--format", source.get("format")), ("--turns", _unless(source.get("turns"), "all"))]
    options += [("--chat-template", "chat-template.jinja" if source.get("chat_template") else None)]
    options += [("--tokenizer", source.get("tokenizer"))]
    options += [(f"--{name}", source.get(name)) for name in ("split", "subset", "samples", "stratify")]
    options += [("--seed", source.get("seed") or None), ("--max-length", source.get("max_length"))]
    if source.get("split") == "train" and not sources[0].startswith(PREFIX):
        options.remove(("--split", "train"))  # elsewhere the default
    options += [("--map", f"{ours}={theirs}") for ours, theirs in (source.get("fields") or {}).items()]
    if source.get("max_new_tokens", AnswerOptions.max_new_tokens) != AnswerOptions.max_new_tokens:
        options.append(("--max-new-tokens", source["max_new_tokens"]))
    if source.get("answers_from", "none") not in ("none", "the model"):
        options.append(("--responses-from", source["answers_from"]))
    for name, value in (source.get("template_args") or {}).items():
        options.append(("--template-arg", f"{name}={value if isinstance(value, str) else json.dumps(value)}"))
    flags = "" if source.get("template", True) else " --no-template"
    return " ".join(f"{name} {shlex.quote(str(value))}" for name, value in options if value is not None) + flags


def _select_command(selection: Selection, source: str) -> str:
    """Empty for a selection that the verb select does not make."""
    rules = selection.constraints
    if "budget_asked" not in rules:
        return ""
    options = [
        ("--keep", f"{selection.keep_asked:g}"),
        *(_scoring_options(selection) if source == "trace" else ()),
        ("--rule", selection.rule),
        ("--routing", selection.routing),
        ("--gate-scale", _unless(selection.gate_scale, "survivors")),
        ("--target", _unless(selection.target, "ragged")),
        ("--curves", "curves.json" if "measured" in rules else None),
        ("--tolerance", rules.get("tolerance")),
        ("--skip-layers", ",".join(map(str, rules.get("skip_layers") or ()))),
        *(("--protect", f"{layer}:{','.join(map(str, ids))}") for layer, ids in (rules.get("protect") or {}).items()),
        ("--multiple-of", _unless(rules.get("multiple_of"), 1)),
        ("--top-k", selection.top_k if source != "trace" and selection.routing == "reroute" else None),
    ]
    given = " ".join(f"{name} {shlex.quote(str(value))}" for name, value in options if value not in (None, ""))
    rounded = " --allow-rounding" if selection.kept != rules["budget_asked"] else ""
    return f"shape-moe select {source} {given}{rounded} -o selection.json"


def _scoring_options(selection: Selection) -> Facts:
    weights = scoring_of(selection).weights
    options = [(f"--{name}-weight", f"{weight:g}") for name, weight in weights.flags.items()] if weights else []
    seed = selection.options.get("seed", 0)
    return [("--scorer", selection.scorer), *options, *([("--seed", f"{seed:g}")] if seed else [])]


def _unless(value: Any, default: Any) -> Any:
    return None if value == default else value
