"""The demonstration: trace one task of the embedded model, prune by every scorer, and see what is left."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from shape_moe.architectures.loading import load_model, load_tokenizer
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.example_maker import AnswerOptions
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.embedded import exact_match
from shape_moe.demo.tasks import TASKS, examples
from shape_moe.embedded_model import embedded_model_path
from shape_moe.errors import UsageError
from shape_moe.evaluation.result_file import header
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.report import report
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import trace
from shape_moe.progress import SILENT, Progress
from shape_moe.reporting.demo_rows import demo_best
from shape_moe.scoring.registry import ScoreOptions, scorers
from shape_moe.scoring.scores import score_trace
from shape_moe.selection.controls import inverted_selection
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.selection.selection import Selection
from shape_moe.tracing.trace import Trace
from shape_moe.workspace import Workspace, write_json

KEEP_RATES = (0.8, 0.6, 0.4, 0.25)
CALIBRATION_EXAMPLES = 25
EVALUATION_PROMPTS = 50
DEMO_FILE = "demo.json"
REPORT_FILE = "report.html"
REPORT_KEEP = 0.6
"""What the report shows where no model does its task."""


@dataclass(frozen=True)
class DemoRow:
    """One model of the table.

    Attributes:
        scorer: how experts were valued; ``dense`` for the unpruned model.
        keep: keep rate met.
        size: bytes of weights on disk.
        on_task: exact match on the traced task, as a share.
        off_task: mean exact match over the other tasks.
    """

    scorer: str
    keep: float
    size: int
    on_task: float
    off_task: float


@dataclass(frozen=True)
class DemoResult:
    """A demonstration.

    Attributes:
        rows: the unpruned model first, then by keep rate and scorer.
        report: an HTML report; None where nothing is kept.
        document: the content of ``demo.json``.
    """

    rows: list[DemoRow]
    report: Path | None
    document: dict[str, Any]


def run_demo(
    task: str = "addition",
    *,
    rule: str = "coverage",
    keep_rates: tuple[float, ...] = KEEP_RATES,
    seed: int = 0,
    folder: Path | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> DemoResult:
    """Prune the embedded model for one task, by every scorer and at every keep rate, and judge each result.

    Checkpoints are really written, and loaded again from disk.

    Args:
        task: the task to trace, a key of :data:`shape_moe.demo.tasks.TASKS`.
        rule: how layers share the budget.
        keep_rates: keep rates.
        seed: draws the calibration examples, and the values of scorer random.
        folder: keep trace, checkpoints, the table (``demo.json``) and a report here; None throws them away.
        force: replace an earlier demonstration in ``folder``.
        progress: where to show progress.

    Raises:
        UsageError: for an unknown task or rule, a keep rate outside (0, 1], and an output that exists.
    """
    if task not in TASKS:
        raise UsageError(f"There is no task {task!r}; there are {', '.join(TASKS)}.")
    for keep in keep_rates:
        SelectOptions(keep, Method(rule=rule))
    job = {**header("demo"), "task": task, "rule": rule, "keep_rates": keep_rates, "seed": seed}
    with ExitStack() as stack:
        if folder is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            traced = _trace_task(task, seed, work, work, progress)
            rows = _judged(traced, task, rule, keep_rates, seed, work, progress)
            return DemoResult(rows, None, _document(job, traced, rows))
        space = stack.enter_context(Workspace(folder, job, force=force))
        traced = _trace_task(task, seed, space.path, folder, progress)
        rows = _judged(traced, task, rule, keep_rates, seed, space.path, progress)
        document = _document(job, traced, rows)
        write_json(space.path / DEMO_FILE, document)
        space.complete()
    return DemoResult(rows, _report(traced, document, seed, folder, progress), document)


def _document(job: Mapping[str, Any], traced: Trace, rows: list[DemoRow]) -> dict[str, Any]:
    """The content of ``demo.json``."""
    size = {"layers": len(traced.info.layers), "experts": traced.info.num_experts}
    return {**job, **size, "rows": [asdict(row) for row in rows]}


def _judged(
    traced: Trace,
    task: str,
    rule: str,
    keep_rates: tuple[float, ...],
    seed: int,
    work: Path,
    progress: Progress,
) -> list[DemoRow]:
    chosen = list(_selections(traced, rule, keep_rates, seed))
    rows = [_judge("dense", 1.0, embedded_model_path(), task)]
    with progress.phase("Pruning, reloading and judging", len(chosen), "model") as advance:
        for selection in chosen:
            name = f"{task}-{selection.scorer}-{selection.keep_asked:g}".replace(", ", "-")
            options = PruneOptions(check_logits=False, device="cpu", force=True)
            result = prune(embedded_model_path(), work / name, options, selection=selection)
            rows.append(_judge(selection.scorer, selection.keep, result.path, task))
            advance(1)
    return rows


def _trace_task(task: str, seed: int, work: Path, home: Path, progress: Progress) -> Trace:
    """Trace the task in a working folder, for one whose final name is ``home``."""
    file = work / f"{task}.jsonl"
    records = examples(task, CALIBRATION_EXAMPLES, seed=seed)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    answers = AnswerOptions(batch_size=CALIBRATION_EXAMPLES)
    options = ExampleOptions(DataOptions(str(file)), answers=answers, device="cpu")
    traced = trace(embedded_model_path(), options, progress=progress)
    place = str(home / file.name)
    source = {**traced.info.source, "data": place, "sources": [place]}
    traced = replace(traced, info=replace(traced.info, source=source))
    traced.save(work / _trace_folder(task))
    return traced


def _trace_folder(task: str) -> str:
    return f"{task}-trace"


def _report(traced: Trace, document: Mapping[str, Any], seed: int, folder: Path, progress: Progress) -> Path:
    """A report on the selection that was best, of the published scorer where none was good."""
    best, rule = demo_best(document), str(document["rule"])
    keep, scorer = (float(best.row["keep"]), str(best.row["scorer"])) if best else (REPORT_KEEP, Method.scorer)
    options = SelectOptions(keep, Method(scorer, rule), ScoreOptions(seed=seed))
    selection = select_from_trace(traced, options)
    file = folder / REPORT_FILE
    return report(folder, file, selection=selection, model=embedded_model_path(), progress=progress).path


def _selections(traced: Trace, rule: str, keep_rates: tuple[float, ...], seed: int) -> Iterator[Selection]:
    scoring = ScoreOptions(seed=seed)
    for keep in keep_rates:
        for scorer in scorers():
            selection = select_from_trace(traced, SelectOptions(keep, Method(scorer, rule), scoring))
            yield selection
            if scorer == "shape":
                yield inverted_selection(selection, score_trace(traced, scorer, scoring))


def _judge(scorer: str, keep: float, path: Path, task: str) -> DemoRow:
    snapshot = open_snapshot(path)
    model = load_model(snapshot, device="cpu")
    scores = exact_match(model, load_tokenizer(path), count=EVALUATION_PROMPTS)
    others = [score for name, score in scores.items() if name != task]
    return DemoRow(scorer, keep, snapshot.total_bytes, scores[task], fmean(others))
