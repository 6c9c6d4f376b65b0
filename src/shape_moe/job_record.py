"""What a folder in the making says of its job: ``job.json``, which is there until the job is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shape_moe.documents import as_shape
from shape_moe.errors import CheckpointError
from shape_moe.json_file import read_json
from shape_moe.source_files import SourceFile

JOB_FILE = "job.json"


@dataclass(frozen=True)
class JobRecord:
    """The content of ``job.json``.

    Attributes:
        digest: of the job's description.
        job: inputs and options that decide the result.
        inputs: the files that the job reads, by absolute path.
        complete: whether the folder holds the whole result, which only has to get its name.
        replaces: name of the sibling that an older result has while that happens; None where there is none.
    """

    digest: str
    job: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, SourceFile] = field(default_factory=dict)
    complete: bool = False
    replaces: str | None = None


def read_job(folder: Path) -> JobRecord | None:
    """The record in a folder, None where it has none of ours."""
    try:
        file = folder / JOB_FILE
        return as_shape(read_json(file), JobRecord, file, "a job of this tool")
    except (CheckpointError, OSError):
        return None
