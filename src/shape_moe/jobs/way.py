"""How a model is run to be traced: whole, or layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shape_moe.architectures.layered_model import why_not_layered
from shape_moe.architectures.loading import free_memory, loaded_bytes, why_not_loadable
from shape_moe.architectures.placement import is_map
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.errors import ShapeMoeError, UsageError
from shape_moe.tracing import layer_by_layer, whole_model
from shape_moe.tracing.ranks import Ranks
from shape_moe.units import counted, readable_size

if TYPE_CHECKING:
    from shape_moe.jobs.session import ExampleOptions

WHOLE, STREAM = "transformers", "stream"
WAYS = (WHOLE, STREAM)
"""Names of the engines that run a Transformers model."""


@dataclass(frozen=True)
class Way:
    """How a model is run.

    Attributes:
        engine: name of the engine.
        reason: a sentence that says which way and why, None where the user has said it.
    """

    engine: str
    reason: str | None = None


def check_way(engine: str, stream: bool | None) -> None:
    """Refuse a way that the engine does not have.

    Raises:
        UsageError: saying what goes with what.
    """
    if stream is not None and engine not in WAYS:
        raise UsageError(f"--stream and --no-stream are about Transformers models, not about --engine {engine}.")
    if stream is False and engine == STREAM:
        raise UsageError(f"--engine {STREAM} is what --stream means; leave --no-stream out.")


def check_live(options: ExampleOptions) -> None:
    """Refuse to read a live model layer by layer.

    Raises:
        UsageError: where that was asked for.
    """
    if options.stream or options.engine == STREAM:
        raise UsageError("A live model is in memory already; give its folder to trace it layer by layer.")


def check_shared(options: ExampleOptions, ranks: Ranks) -> None:
    """Refuse to share what cannot be shared.

    Raises:
        UsageError: for another engine than Transformers, and where examples may be left out.
    """
    if ranks.count > 1 and options.engine not in WAYS:
        raise UsageError(f"--engine {options.engine} has processes of its own: start it without torchrun.")
    if ranks.count > 1 and options.answers.skip_bad:
        raise UsageError("--skip-bad does not go with torchrun: one process does not know what another leaves out.")


def choose_way(snapshot: Snapshot, options: ExampleOptions, folder: Path | None, *, loaded: bool) -> Way:
    """Whole or layer by layer: as asked, as an interrupted run began, or by free memory.

    Args:
        snapshot: the model.
        options: how it runs.
        folder: where an interrupted run may have left something.
        loaded: whether the model is in memory already.
    """
    asked = True if options.engine == STREAM else options.stream
    if asked is not None:
        return Way(STREAM if asked else WHOLE)
    if layer_by_layer.is_unfinished(folder):
        return Way(STREAM, "Continuing layer by layer, as the interrupted run began.")
    if loaded or whole_model.is_unfinished(folder):
        return Way(WHOLE)
    return _by_free_memory(snapshot, options)


def _by_free_memory(snapshot: Snapshot, options: ExampleOptions) -> Way:
    if is_map(options.device):
        return Way(WHOLE, "The whole model is held where --device-map puts its parts.")
    sizes = (
        f"it needs {readable_size(_needed(snapshot, options))}, {readable_size(free_memory(options.device))} are free"
    )
    if why_not_loadable(_needed(snapshot, options), options.device) is None:
        return Way(WHOLE, f"The whole model is held in memory: {sizes}.")
    if (reason := why_not_layered(snapshot)) is not None:
        return Way(WHOLE, f"The model is not read layer by layer, because {reason}.")
    return Way(STREAM, f"The model is read layer by layer: {sizes} (--no-stream tries to hold it whole).")


def check_measurable(snapshot: Snapshot, options: ExampleOptions) -> None:
    """Refuse to measure layers of a model that is read layer by layer.

    Raises:
        UsageError: saying what to do instead.
    """
    if options.engine in WAYS and choose_way(snapshot, options, None, loaded=False).engine == STREAM:
        needed, free = readable_size(_needed(snapshot, options)), readable_size(free_memory(options.device))
        raise UsageError(
            f"Layers are measured with the whole model in memory, which takes {needed} ({free} are free); use another "
            "rule (--rule coverage), or curves that were measured elsewhere (--curves)."
        )


def check_answers_fit(snapshot: Snapshot, options: ExampleOptions, prompts: int) -> None:
    """Refuse to let a model answer that does not fit into memory.

    Raises:
        ShapeMoeError: saying where answers can come from instead.
    """
    if (reason := why_not_loadable(_needed(snapshot, options), options.device)) is not None:
        raise ShapeMoeError(
            f"{counted(prompts, 'prompt')} without a response cannot be answered here: {reason}, and layer by layer "
            "the model would be read once for every token. Take answers from a server of this model (--responses-from "
            "URL), give data that has responses, or trace the prompts alone (--max-new-tokens 0)."
        )


def _needed(snapshot: Snapshot, options: ExampleOptions) -> int:
    return loaded_bytes(snapshot, options.dtype)
