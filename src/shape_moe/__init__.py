"""shape-moe: make sparse Mixture-of-Experts language models smaller by removing routed experts.

Importing this package is light: torch and transformers are imported when something needs them. From then on,
``AutoModelForCausalLM.from_pretrained`` loads pruned checkpoints.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shape_moe.serving.transformers_auto import install as _install

if TYPE_CHECKING:
    from shape_moe.calibration.example_maker import AnswerOptions
    from shape_moe.calibration.examples import TokenOptions
    from shape_moe.calibration.records import DataOptions
    from shape_moe.evaluation.generation import GenerationOptions
    from shape_moe.evaluation.harness import TaskOptions
    from shape_moe.evaluation.keep_rate import Limit
    from shape_moe.experiments.run import experiment
    from shape_moe.jobs.convert import convert
    from shape_moe.jobs.evaluate import evaluate
    from shape_moe.jobs.evaluate_endpoints import EndpointOptions, evaluate_endpoints
    from shape_moe.jobs.evaluate_options import EvaluateOptions
    from shape_moe.jobs.families import families
    from shape_moe.jobs.inspect import inspect_model
    from shape_moe.jobs.measure import measure
    from shape_moe.jobs.prune import prune
    from shape_moe.jobs.prune_options import PruneOptions
    from shape_moe.jobs.prune_series import prune_series
    from shape_moe.jobs.refit import refit
    from shape_moe.jobs.report import report
    from shape_moe.jobs.select import score, select
    from shape_moe.jobs.session import ExampleOptions
    from shape_moe.jobs.sweep import SweepOptions, sweep
    from shape_moe.jobs.trace import merge, trace
    from shape_moe.jobs.verify import verify
    from shape_moe.pruning.masks import masked
    from shape_moe.pruning.surgery import prune_model
    from shape_moe.scoring.registry import ScoreOptions
    from shape_moe.selection.layer_curves import load_curves
    from shape_moe.selection.method import Method
    from shape_moe.selection.select import SelectOptions
    from shape_moe.selection.selection import Selection, load_selection
    from shape_moe.tracing.token_weights import PredictingWeights, SegmentWeights
    from shape_moe.tracing.trace import Trace, load_trace

__version__ = "0.1.0"

__all__ = [
    "AnswerOptions",
    "DataOptions",
    "EndpointOptions",
    "EvaluateOptions",
    "ExampleOptions",
    "GenerationOptions",
    "Limit",
    "Method",
    "PredictingWeights",
    "PruneOptions",
    "ScoreOptions",
    "SegmentWeights",
    "SelectOptions",
    "Selection",
    "SweepOptions",
    "TaskOptions",
    "TokenOptions",
    "Trace",
    "__version__",
    "convert",
    "evaluate",
    "evaluate_endpoints",
    "experiment",
    "families",
    "inspect_model",
    "load_curves",
    "load_selection",
    "load_trace",
    "masked",
    "measure",
    "merge",
    "prune",
    "prune_model",
    "prune_series",
    "refit",
    "report",
    "score",
    "select",
    "sweep",
    "trace",
    "verify",
]

_HOMES = {
    "calibration.example_maker": ("AnswerOptions",),
    "calibration.examples": ("TokenOptions",),
    "calibration.records": ("DataOptions",),
    "evaluation.generation": ("GenerationOptions",),
    "evaluation.harness": ("TaskOptions",),
    "evaluation.keep_rate": ("Limit",),
    "jobs.convert": ("convert",),
    "jobs.evaluate": ("evaluate",),
    "jobs.evaluate_options": ("EvaluateOptions",),
    "jobs.evaluate_endpoints": ("EndpointOptions", "evaluate_endpoints"),
    "experiments.run": ("experiment",),
    "jobs.families": ("families",),
    "jobs.inspect": ("inspect_model",),
    "jobs.measure": ("measure",),
    "jobs.prune": ("prune",),
    "jobs.prune_options": ("PruneOptions",),
    "jobs.prune_series": ("prune_series",),
    "jobs.refit": ("refit",),
    "jobs.report": ("report",),
    "jobs.select": ("score", "select"),
    "jobs.session": ("ExampleOptions",),
    "jobs.sweep": ("SweepOptions", "sweep"),
    "jobs.trace": ("merge", "trace"),
    "jobs.verify": ("verify",),
    "pruning.masks": ("masked",),
    "pruning.surgery": ("prune_model",),
    "scoring.registry": ("ScoreOptions",),
    "selection.layer_curves": ("load_curves",),
    "selection.method": ("Method",),
    "selection.select": ("SelectOptions",),
    "selection.selection": ("Selection", "load_selection"),
    "tracing.token_weights": ("PredictingWeights", "SegmentWeights"),
    "tracing.trace": ("Trace", "load_trace"),
}
_HOME_OF = {name: f"shape_moe.{home}" for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'shape_moe' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


_install()
