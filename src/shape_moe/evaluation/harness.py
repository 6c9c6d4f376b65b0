"""Tasks of lm-evaluation-harness: on a live model, dense or masked, or through its vLLM backend.

lm-eval's own Python interface does the work. Nothing is printed on stdout, no model or tokenizer is changed, nothing is
sent anywhere; data sets come from the hub or its cache as the task says.
"""

from __future__ import annotations

import copy
import gc
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shape_moe.architectures.loading import input_device
from shape_moe.errors import DataError, ShapeMoeError, UsageError, first_line
from shape_moe.evaluation.task_results import Estimate, TaskResult, paired_difference, task_results
from shape_moe.progress import SILENT, Advance, Progress
from shape_moe.selection.selection import Selection
from shape_moe.serving.vllm import overrides

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Estimate", "TaskResult", "paired_difference", "run_tasks", "run_tasks_with_vllm"]

_BOOTSTRAP = 1000
"""Resamples for the few metrics whose standard error has no formula; lm-eval's 100,000 take hours."""


@dataclass(frozen=True)
class _Run:
    """What decides a run beside model and tasks."""

    limit: int | None
    num_fewshot: int | None
    seed: int
    apply_chat_template: bool
    unsafe_code: bool
    progress: Progress

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit must be at least 1, not {self.limit}.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UsageError(f"num-fewshot must be at least 0, not {self.num_fewshot}.")


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int,
    limit: int | None = None,
    num_fewshot: int | None = None,
    seed: int = 0,
    apply_chat_template: bool = False,
    unsafe_code: bool = False,
    progress: Progress = SILENT,
) -> dict[str, TaskResult]:
    """Run tasks on a live model, which may be under :func:`shape_moe.masked`.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        tasks: names of lm-eval's tasks, groups or tags, or paths of YAML files that define one.
        batch_size: requests per forward pass.
        limit: the first items of every task only.
        num_fewshot: examples in the prompt; None for the task's own number. A task that sets it to 0 keeps 0.
        seed: draws few-shot examples, and whatever else a task draws.
        apply_chat_template: put prompts through the tokenizer's chat template.
        unsafe_code: run tasks that execute the code that the model writes.
        progress: where to show progress.

    Returns:
        Results by task, and by group where a group says how to aggregate.

    Raises:
        UsageError: when lm-eval is missing, a task does not exist or cannot be used, or an option does not fit.
        DataError: when the data set of a task cannot be loaded.
        ShapeMoeError: when lm-eval fails while it runs.
    """
    run = _Run(limit, num_fewshot, seed, apply_chat_template, unsafe_code, progress)
    if apply_chat_template and not tokenizer.chat_template:
        raise UsageError("The chat template is asked for, but the tokenizer has none.")
    _require("lm_eval", "lm-evaluation-harness", "eval")
    with _quietly(), _seeded(seed), _own_limits(model):
        loaded = _load(tasks)
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=model, tokenizer=_with_padding(tokenizer), batch_size=batch_size)
        lm._device = input_device(model)  # noqa: SLF001  # lm-eval takes the first weight's, which offloading moves
        return _evaluate(lm, loaded, run)


def run_tasks_with_vllm(
    path: str | PathLike[str],
    tasks: Sequence[str],
    *,
    selection: Selection | str | PathLike[str] | None = None,
    engine_args: Mapping[str, Any] | None = None,
    batch_size: int | str = "auto",
    limit: int | None = None,
    num_fewshot: int | None = None,
    seed: int = 0,
    apply_chat_template: bool = False,
    unsafe_code: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> dict[str, TaskResult]:
    """Run tasks through lm-eval's vLLM backend: on any checkpoint, or on an original with a selection applied.

    Args:
        path: folder or hub id of the checkpoint.
        tasks: as in :func:`run_tasks`.
        selection: serve the original with this selection (or its file) applied.
        engine_args: arguments of ``vllm.LLM``, such as ``max_model_len`` or ``tensor_parallel_size``.
        batch_size: ``auto`` leaves batching to the engine.
        limit: as in :func:`run_tasks`, as are ``num_fewshot``, ``seed``, ``apply_chat_template``, ``unsafe_code`` and
            ``progress``.
        force: accept a selection made from a live model of unknown origin.

    Raises:
        UsageError: as in :func:`run_tasks`, and when vLLM is missing.
        DataError: when the data set of a task cannot be loaded.
        ShapeMoeError: when the selection does not fit, or vLLM cannot load or run the model.
    """
    run = _Run(limit, num_fewshot, seed, apply_chat_template, unsafe_code, progress)
    arguments = dict(engine_args or {})
    taken = {"model", "pretrained", "seed", "batch_size"} | ({"hf_overrides"} if selection is not None else set())
    if decided := sorted(taken & set(arguments)):
        raise UsageError(f"The engine argument {decided[0]} is decided by this run; leave it out.")
    _require("lm_eval", "lm-evaluation-harness", "eval")
    _require("vllm", "vLLM", "vllm")
    if selection is not None:
        arguments["hf_overrides"] = overrides(path, selection, revision=arguments.get("revision"), force=force)
    # read by vLLM when it is imported, and by its processes: logs go to stderr, and no statistics to its makers
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    with _quietly(), _seeded(seed):
        loaded = _load(tasks)
        with _engine(path, arguments, seed, batch_size, progress) as lm:
            if apply_chat_template and not lm.tokenizer.chat_template:
                raise UsageError("The chat template is asked for, but the tokenizer has none.")
            return _evaluate(lm, loaded, run)


@contextmanager
def _engine(
    path: str | PathLike[str], arguments: dict[str, Any], seed: int, batch_size: int | str, progress: Progress
) -> Iterator[Any]:
    from lm_eval.models.vllm_causallms import VLLM

    with progress.phase("Starting vLLM", 1, "engine") as advance:
        try:
            lm = VLLM(pretrained=str(path), seed=seed, batch_size=batch_size, **arguments)
        except (AssertionError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise ShapeMoeError(f"vLLM cannot load {path}: {first_line(error)}") from error
        advance(1)
    try:
        yield lm
    finally:
        if hasattr(lm, "model"):  # engines of data-parallel workers end with their requests
            lm.model.llm_engine.engine_core.shutdown()
        gc.collect()


def _require(module: str, name: str, extra: str) -> None:
    if find_spec(module) is None:
        raise UsageError(f"{name} is not installed: pip install 'shape-moe[{extra}]'.")


def _evaluate(lm: Any, loaded: dict[str, Any], run: _Run) -> dict[str, TaskResult]:
    import jinja2
    import lm_eval

    names = ", ".join(loaded["tasks"])
    for task in loaded["tasks"].values():
        _set_fewshot(task, run)
    if not run.unsafe_code and (unsafe := [n for n, t in loaded["tasks"].items() if getattr(t, "UNSAFE_CODE", False)]):
        raise UsageError(f"Task {unsafe[0]} executes code that the model writes; it runs only where that is allowed.")
    with _progress_of(lm, run.progress), _seeded(run.seed):
        try:
            results = lm_eval.evaluate(
                lm=lm,
                task_dict=loaded,
                limit=run.limit,
                bootstrap_iters=_BOOTSTRAP,
                apply_chat_template=run.apply_chat_template,
                fewshot_as_multiturn=run.apply_chat_template,
                confirm_run_unsafe_code=run.unsafe_code,
            )
        except (AssertionError, LookupError, TypeError, ValueError, jinja2.TemplateError) as error:
            raise ShapeMoeError(f"lm-eval could not run {names}: {first_line(error)}") from error
    if results is None:
        raise ShapeMoeError("lm-eval gave no results: only the first process of several has them.")
    return task_results(results, version("lm_eval"))


def _set_fewshot(task: Any, run: _Run) -> None:
    """As lm-eval's own command does: a number of examples that a task sets to 0 stays."""
    own = task.get_config("num_fewshot")
    if own != 0:
        task.set_config(key="num_fewshot", value=run.num_fewshot if run.num_fewshot is not None else own or 0)
    task.set_fewshot_seed(seed=run.seed)


def _load(specs: Iterable[str]) -> dict[str, Any]:
    """The tasks and groups that names and files stand for, ready to run."""
    from datasets.exceptions import DatasetsError

    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    folders = {str(_definition(spec).parent) for spec in specs if _is_file_name(spec)}
    for spec in specs:
        manager = _manager_of(spec, sorted(folders))
        try:
            found = manager.load([_name_in(manager, spec)])
        except (DatasetsError, OSError) as error:
            raise DataError(
                f"The data of task {spec} could not be loaded: {first_line(error)}. Without a network it must lie in "
                "the cache already."
            ) from error
        except ImportError as error:
            raise UsageError(f"Task {spec} needs a package that is not installed: {first_line(error)}.") from error
        except Exception as error:  # definitions are programs in part and raise what they like
            raise UsageError(f"Task {spec} cannot be used: {first_line(error)}.") from error
        for part, entries in loaded.items():
            entries.update(found.get(part, {}))
    if not loaded["tasks"]:
        raise UsageError("No tasks are given.")
    return loaded


def _is_file_name(spec: str) -> bool:
    return spec.endswith((".yaml", ".yml"))


def _definition(spec: str) -> Path:
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UsageError(f"There is no file {spec}.")
    return path.absolute()


def _manager_of(spec: str, folders: Sequence[str]) -> Any:
    """The index that knows a task. lm-eval's own holds 15,000 and takes seconds to build: only where it is needed."""
    from lm_eval.tasks import TaskManager

    if _is_file_name(spec):
        is_group = re.search(r"^group\s*:", _definition(spec).read_text(encoding="utf-8"), re.MULTILINE)
        return TaskManager(include_path=list(folders), include_defaults=bool(is_group))
    local = TaskManager(include_path=list(folders), include_defaults=False)
    if spec in local.all_tasks:
        return local
    known = _built_in().all_tasks
    if spec not in known:
        near = get_close_matches(spec, [*known, *local.all_tasks], n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists them."
        raise UsageError(f"There is no task {spec!r}; {advice}")
    return _built_in()


def _name_in(manager: Any, spec: str) -> str:
    """What a task is called in an index; lm-eval can load a task from its file, but not a group."""
    if not _is_file_name(spec):
        return spec
    path = _definition(spec)
    names = (name for name, entry in manager.task_index.items() if entry.yaml_path == path)
    return next(names, str(path))


@cache
def _built_in() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


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
