"""Tasks of lm-evaluation-harness by their names, and by the files that define them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from shape_moe.errors import DataError, UsageError, first_line
from shape_moe.literal_paths import expand_home


def check_exist(specs: Sequence[str]) -> None:
    """Look tasks, groups and tags up; no definition is carried out, and no data set is read.

    Args:
        specs: names, or paths of YAML files.

    Raises:
        UsageError: when one does not exist.
    """
    folders = _folders(specs)
    for spec in specs:
        if not _is_file_name(spec):
            _manager_of(spec, folders)


def load_tasks(specs: Sequence[str]) -> dict[str, Any]:
    """The tasks and groups that names and files stand for, ready to run.

    Raises:
        UsageError: when one does not exist or cannot be used.
        DataError: when the data set of one cannot be loaded.
    """
    from datasets.exceptions import DatasetsError

    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    folders = _folders(specs)
    for spec in specs:
        manager = _manager_of(spec, folders)
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
        raise UsageError(f"There is no task in {', '.join(specs)}.")
    return loaded


def _folders(specs: Sequence[str]) -> list[str]:
    """Where tasks that are given as files lie: their groups and other tasks can be named."""
    return sorted({str(_definition(spec).parent) for spec in specs if _is_file_name(spec)})


def _is_file_name(spec: str) -> bool:
    return spec.endswith((".yaml", ".yml"))


def _definition(spec: str) -> Path:
    path = expand_home(spec)
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
