"""Tasks of lm-evaluation-harness: on a live model, dense or masked, or through its vLLM backend.

lm-eval's own Python interface does the work. Nothing is printed on stdout, no model or tokenizer is changed, nothing is
sent anywhere; data sets come from the hub or its cache as the task says.
"""

from __future__ import annotations

import copy
import gc
import os
import random
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from shape_moe.architectures.loading import input_device
from shape_moe.errors import ShapeMoeError, UsageError, first_line
from shape_moe.evaluation.task_definitions import check_exist, load_tasks
from shape_moe.evaluation.task_results import TaskResult, task_results
from shape_moe.literal_paths import plain_model
from shape_moe.progress import SILENT, Advance, Progress
from shape_moe.selection.selection import Selection
from shape_moe.serving.vllm import overrides

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BOOTSTRAP = 1000
"""Resamples for the few metrics whose standard error has no formula; lm-eval's 100,000 take hours."""
_DECIDED = ("model", "pretrained", "seed", "batch_size")
"""Arguments of an engine that a run decides itself."""


_ENGINES = ("transformers", "vllm")
"""What runs tasks: models that lm-evaluation-harness knows."""


@dataclass(frozen=True)
class TaskOptions:
    """Tasks of lm-evaluation-harness, and how they are run.

    Attributes:
        names: lm-eval's tasks, groups or tags, or paths of YAML files that define one.
        limit: the first items of each only.
        num_fewshot: examples in the prompt, None for the task's own number. A task that sets it to 0 keeps 0.
        chat_template: put prompts through the tokenizer's chat template.
        unsafe_code: run tasks that execute the code that the model writes.
        engine: ``transformers`` or ``vllm``.
        engine_args: further arguments of ``vllm.LLM``, such as ``max_model_len`` or ``tensor_parallel_size``.

    Raises:
        UsageError: when no task is named, for numbers that make no sense, for an unknown engine, and for arguments
            that the engine does not take or that the run decides.
    """

    names: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False
    unsafe_code: bool = False
    engine: str = "transformers"
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.names:
            raise UsageError("Name at least one task.")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit must be at least 1, not {self.limit}.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UsageError(f"num-fewshot must be at least 0, not {self.num_fewshot}.")
        _check_engine(self.engine, self.engine_args)
        _refuse_decided(self.engine_args, _DECIDED)


def _check_engine(engine: str, arguments: Mapping[str, Any]) -> None:
    if engine not in _ENGINES:
        raise UsageError(f"There is no engine {engine!r}; there are {' and '.join(_ENGINES)}.")
    if engine != "vllm" and arguments:
        raise UsageError("Engine arguments go with --engine vllm.")


def check_tasks(names: Sequence[str], engine: str = "transformers") -> None:
    """Check what can be checked of tasks before a model is loaded.

    Args:
        names: as in :class:`TaskOptions`.
        engine: what is to run them.

    Raises:
        UsageError: when lm-eval (or vLLM, where it is to run them) is missing, or a task does not exist.
    """
    _require("lm_eval", "lm-evaluation-harness", "lm-eval")
    if engine == "vllm":
        _require("vllm", "vLLM", "vllm==0.32.0")
    with _quietly():
        check_exist(names)


def check_chat_template(options: TaskOptions, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse to ask through a chat template where there is none.

    Raises:
        UsageError: when it is asked for and the tokenizer has none.
    """
    if options.chat_template and not tokenizer.chat_template:
        raise UsageError("The chat template is asked for, but the tokenizer has none.")


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: TaskOptions,
    *,
    batch_size: int,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, TaskResult]:
    """Run tasks on a live model, which may be under :func:`shape_moe.masked`.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        options: the tasks; what is said of an engine is not looked at.
        batch_size: requests per forward pass.
        seed: draws few-shot examples, and whatever else a task draws.
        progress: where to show progress.

    Returns:
        Results by task, and by group where a group says how to aggregate.

    Raises:
        UsageError: when lm-eval is missing, a task does not exist or cannot be used, or an option does not fit.
        DataError: when the data set of a task cannot be loaded.
        ShapeMoeError: when lm-eval fails while it runs.
    """
    check_chat_template(options, tokenizer)
    _require("lm_eval", "lm-evaluation-harness", "lm-eval")
    with _quietly(), _seeded(seed), _own_limits(model):
        loaded = load_tasks(options.names)
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=model, tokenizer=_with_padding(tokenizer), batch_size=batch_size)
        lm._device = input_device(model)  # noqa: SLF001  # lm-eval takes the first weight's, which offloading moves
        return _evaluate(lm, loaded, options, seed, progress)


def run_tasks_with_vllm(
    path: str | PathLike[str],
    options: TaskOptions,
    *,
    selection: Selection | str | PathLike[str] | None = None,
    batch_size: int | str = "auto",
    seed: int = 0,
    force: bool = False,
    progress: Progress = SILENT,
) -> dict[str, TaskResult]:
    """Run tasks through lm-eval's vLLM backend: on any checkpoint, or on an original with a selection applied.

    Args:
        path: folder or hub id of the checkpoint.
        options: the tasks, and arguments of the engine.
        selection: serve the original with this selection (or its file) applied.
        batch_size: ``auto`` leaves batching to the engine.
        seed: as in :func:`run_tasks`.
        force: accept a selection made from a live model of unknown origin.
        progress: where to show progress.

    Raises:
        UsageError: as in :func:`run_tasks`, and when vLLM is missing.
        DataError: when the data set of a task cannot be loaded.
        ShapeMoeError: when the selection does not fit, or vLLM cannot load or run the model.
    """
    arguments = dict(options.engine_args)
    if selection is not None:
        _refuse_decided(arguments, {"hf_overrides"})
    _require("lm_eval", "lm-evaluation-harness", "lm-eval")
    _require("vllm", "vLLM", "vllm==0.32.0")
    if selection is not None:
        arguments["hf_overrides"] = overrides(path, selection, revision=arguments.get("revision"), force=force)
    # read by vLLM when it is imported, and by its processes: logs go to stderr, and no statistics to its makers
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    with _quietly(), _seeded(seed):
        loaded = load_tasks(options.names)
        with _engine(path, arguments, seed, batch_size, progress) as lm:
            check_chat_template(options, lm.tokenizer)
            return _evaluate(lm, loaded, options, seed, progress)


@contextmanager
def _engine(
    path: str | PathLike[str], arguments: dict[str, Any], seed: int, batch_size: int | str, progress: Progress
) -> Iterator[Any]:
    from lm_eval.models.vllm_causallms import VLLM

    with ExitStack() as stack:
        name = stack.enter_context(plain_model(path))
        advance = stack.enter_context(progress.phase("Starting vLLM", 1, "engine"))
        try:
            lm = VLLM(pretrained=name, seed=seed, batch_size=batch_size, **arguments)
        except (AssertionError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise ShapeMoeError(f"vLLM cannot load {path}: {first_line(error)}") from error
        advance(1)
    try:
        yield lm
    finally:
        if hasattr(lm, "model"):  # engines of data-parallel workers end with their requests
            lm.model.llm_engine.engine_core.shutdown()
        gc.collect()


def _require(module: str, name: str, package: str) -> None:
    if find_spec(module) is None:
        raise UsageError(f"{name} is not installed: pip install {package}.")


def _refuse_decided(arguments: Mapping[str, Any], taken: Collection[str]) -> None:
    if decided := sorted(set(taken) & set(arguments)):
        raise UsageError(f"The engine argument {decided[0]} is decided by this run; leave it out.")


def _evaluate(
    lm: Any, loaded: dict[str, Any], options: TaskOptions, seed: int, progress: Progress
) -> dict[str, TaskResult]:
    import jinja2
    import lm_eval

    names = ", ".join(loaded["tasks"])
    for task in loaded["tasks"].values():
        _set_fewshot(task, options.num_fewshot, seed)
    if not options.unsafe_code and (
        unsafe := [n for n, t in loaded["tasks"].items() if getattr(t, "UNSAFE_CODE", False)]
    ):
        raise UsageError(f"Task {unsafe[0]} executes code that the model writes; it runs only where that is allowed.")
    with _progress_of(lm, progress), _seeded(seed):
        try:
            results = lm_eval.evaluate(
                lm=lm,
                task_dict=loaded,
                limit=options.limit,
                bootstrap_iters=_BOOTSTRAP,
                apply_chat_template=options.chat_template,
                fewshot_as_multiturn=options.chat_template,
                confirm_run_unsafe_code=options.unsafe_code,
            )
        except (AssertionError, LookupError, TypeError, ValueError, jinja2.TemplateError) as error:
            raise ShapeMoeError(f"lm-eval could not run {names}: {first_line(error)}") from error
    if results is None:
        raise ShapeMoeError("lm-eval gave no results: only the first process of several has them.")
    return task_results(results, version("lm_eval"))


def _set_fewshot(task: Any, wanted: int | None, seed: int) -> None:
    """As lm-eval's own command does: a number of examples that a task sets to 0 stays."""
    own = task.get_config("num_fewshot")
    if own != 0:
        task.set_config(key="num_fewshot", value=wanted if wanted is not None else own or 0)
    task.set_fewshot_seed(seed=seed)


def _with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that pads with a token that the model knows; lm-eval would add one."""
    copied = copy.deepcopy(tokenizer)
    if copied.pad_token_id is None:
        copied.pad_token = copied.eos_token or copied.convert_ids_to_tokens(0)
    return copied


@contextmanager
def _own_limits(model: PreTrainedModel) -> Iterator[None]:
    """Let the task alone say how much is generated, and give the model back as it was."""
    settings, training = model.generation_config, model.training
    if settings is not None:
        model.generation_config = copy.deepcopy(settings)
        model.generation_config.max_new_tokens = None  # it would overrule what the task asks for
    try:
        yield
    finally:
        model.generation_config = settings
        model.train(training)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep stdout for results, and lm-eval to one process: it would fork one with a model in it for bootstraps."""
    import datasets

    name, shown = "DISABLE_MULTIPROC", not datasets.are_progress_bars_disabled()
    before = os.environ.get(name)
    os.environ[name] = "1"
    datasets.disable_progress_bars()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed everything that a task may draw from, for a while."""
    import torch

    kept = random.getstate(), np.random.get_state()  # noqa: NPY002  # what tasks draw from
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])  # noqa: NPY002


class _Counter:
    """Stands in for lm-eval's cache, which is told of every answer."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def add_partial(self, *_: Any) -> None:
        """One more answer."""
        self.advance(1)


@contextmanager
def _progress_of(lm: Any, progress: Progress) -> Iterator[None]:
    """Show lm-eval's progress in our way."""
    from lm_eval.api import task

    def shown(kind: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(requests: Sequence[Any]) -> Any:
            with progress.phase(f"Running {kind.replace('_', ' ')} requests", len(requests), "request") as advance:
                lm.set_cache_hook(_Counter(advance))
                return run(requests, disable_tqdm=True)

        return call

    kinds = ("loglikelihood", "loglikelihood_rolling", "generate_until")
    bars = task.tqdm
    try:
        task.tqdm = lambda items, **_: items
        for kind in kinds:
            setattr(lm, kind, shown(kind, getattr(lm, kind)))
        yield
    finally:
        task.tqdm = bars
        for kind in kinds:
            delattr(lm, kind)  # the class's own are back, and the model is not held by a cycle
