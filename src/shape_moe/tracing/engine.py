"""Engines: what fills a trace, behind one interface and registered by name.

An engine is opened for one model and one calibration set (:class:`Work`), and fills a trace in one call that may be
interrupted: what it keeps in the folder that it is given lets the next call go on. A whole Transformers model
(:mod:`shape_moe.tracing.whole_model`), one that is read layer by layer (:mod:`shape_moe.tracing.layer_by_layer`) and a
vLLM engine (:mod:`shape_moe.tracing.vllm_engine`) are here; files of server responses and of coalition counts
(:mod:`shape_moe.interop`) fill traces through the same :class:`Filler`. Other packages add engines through the
entry-point group ``shape_moe.engines``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from shape_moe.architectures.moe_config import MoeConfig
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.calibration.example_maker import Answerer, ExampleMaker
from shape_moe.errors import UsageError
from shape_moe.progress import Progress
from shape_moe.registry import Registry
from shape_moe.tracing.ranks import Ranks
from shape_moe.tracing.statistics import statistics
from shape_moe.tracing.trace import Trace, TraceInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Filler(Protocol):
    """Fills one trace."""

    def fill(self, folder: Path | None) -> Trace:
        """Fill the trace.

        Args:
            folder: where intermediate results are kept and found again, None for nowhere. A trace that was interrupted
                and goes on there is the undisturbed one, byte for byte.

        Raises:
            ShapeMoeError: when the model or the examples cannot be traced; the message says what to do.
        """


class Describe(Protocol):
    """Says where a trace comes from, once the calibration set is known."""

    def __call__(
        self, moe: MoeConfig, layers: tuple[int, ...], implementation: str, dtype: str, engine: str
    ) -> TraceInfo:
        """The provenance of a trace of these layers, made by this engine."""


@dataclass(frozen=True)
class Work:
    """What an engine works with.

    Attributes:
        snapshot: the model on disk, None for a live model.
        model: gives the live model, which is loaded when it is first needed.
        answerer: gives what lets the live model answer prompts.
        examples: the calibration set; its ``run`` gives the examples, its ``skipped`` takes those that fail.
        ranks: the processes that share the calibration set.
        describe: gives the trace's provenance.
        release: lets go of the live model, where it was loaded.
        device: where the model runs, ``auto`` for GPUs where there are some.
        dtype: in which dtype the model runs, ``auto`` for the checkpoint's.
        arguments: further arguments of the engine.
        progress: where to show progress.
        replacement: whether to run the router's next choice for every token, and record what needs it.
    """

    snapshot: Snapshot | None
    model: Callable[[], PreTrainedModel]
    answerer: Callable[[], Answerer]
    examples: ExampleMaker
    ranks: Ranks
    describe: Describe
    release: Callable[[], None]
    device: str
    dtype: str
    arguments: Mapping[str, Any]
    progress: Progress
    replacement: bool = True


@dataclass(frozen=True)
class Engine:
    """A registered engine.

    Attributes:
        name: what users type.
        open: makes what fills one trace.
        statistics: names of the statistics that it gives, beside coalitions.
        takes_arguments: whether it takes arguments of its own.
        shares_model: whether the model may be loaded in this process once the trace is made, so that a larger job goes
            on with it.
    """

    name: str
    open: Callable[[Work], Filler]
    statistics: Callable[[], Collection[str]]
    takes_arguments: bool = False
    shares_model: bool = False


_ENGINES: Registry[Engine] = Registry(
    "engine",
    "shape_moe.engines",
    ("shape_moe.tracing.whole_model", "shape_moe.tracing.layer_by_layer", "shape_moe.tracing.vllm_engine"),
)


def every_statistic() -> Collection[str]:
    """What an engine gives that sees ``h``, ids, ``g`` and ``E_i`` of every token: all that is installed."""
    return statistics()


def register(
    name: str,
    *,
    gives: Callable[[], Collection[str]] = every_statistic,
    takes_arguments: bool = False,
    shares_model: bool = False,
) -> Callable[[type[Any]], type[Any]]:
    """Register a :class:`Filler` class that is made from a :class:`Work`; see :class:`Engine` for the arguments.

    Raises:
        UsageError: when another class has that name already.
    """

    def add(made: type[Any]) -> type[Any]:
        _ENGINES.add(name, Engine(name, made, gives, takes_arguments, shares_model), made)
        return made

    return add


def get_engine(name: str) -> Engine:
    """Look an engine up.

    Raises:
        UsageError: for an unknown name.
    """
    return _ENGINES.get(name)


def check_engine(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse an engine that there is not, and arguments of one that takes none.

    Raises:
        UsageError: for either.
    """
    if arguments and not get_engine(name).takes_arguments:
        takers = [engine.name for engine in _ENGINES.all().values() if engine.takes_arguments]
        raise UsageError(f"Engine arguments go with --engine {' or '.join(takers)}.")
    get_engine(name)
