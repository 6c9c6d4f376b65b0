"""What a job that wrote a model says at its end: the facts of the model card, and what to type next."""

from __future__ import annotations

import shlex
from pathlib import Path

from shape_moe.jobs.judgement import Judgement
from shape_moe.reporting.model_card import CardFacts
from shape_moe.reporting.opening import next_commands
from shape_moe.reporting.provenance import calibration_options
from shape_moe.reporting.series import Series
from shape_moe.selection.selection import Selection
from shape_moe.tracing.trace import Trace


def card_facts(
    model: str,
    sizes: tuple[int, int],
    selection: Selection,
    trace: Trace | None,
    left_out: tuple[str, ...],
    judgement: Judgement | None,
    file: Path | None = None,
    series: Series | None = None,
) -> CardFacts:
    """What the model card tells.

    Args:
        model: the original's name.
        sizes: bytes of all weights, before and after.
        selection: what is kept.
        trace: what it was calibrated with, None where that is not known.
        left_out: what the original has and the pruned model has not, beside experts; sentences.
        judgement: what pruning did, None where it was not judged.
        file: the GGUF file that is written, None for a folder.
        series: the models that were made together with it, None where it was made alone.
    """
    verdict = judgement.verdict if judgement is not None else None
    forgotten = judgement.forgotten.lines() if judgement is not None and judgement.forgotten is not None else ()
    named = file.name if file is not None else None
    return CardFacts(
        model, *sizes, selection, selection.target, trace, left_out, verdict, tuple(forgotten), named, series
    )


def commands_after(facts: CardFacts, path: Path) -> list[str]:
    """What to type next, the report last.

    Args:
        facts: of the model that was written.
        path: its folder.
    """
    data = calibration_options(facts.trace.info) if facts.trace is not None else None
    keep, method = facts.selection.keep, facts.selection.method
    following = next_commands(facts.model, str(path), facts.verdict, keep=keep, method=method, data=data)
    return [*following, f"shape-moe report {shlex.quote(str(path))} -o report.html"]
