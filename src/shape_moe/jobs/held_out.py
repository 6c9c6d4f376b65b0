"""Held-out examples for a model: drawn, answered where they lack a response, and never those that it was traced on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shape_moe.architectures.loading import vocabulary_size
from shape_moe.calibration.example_maker import ExampleMaker
from shape_moe.calibration.reading import load_records, sample_records
from shape_moe.calibration.records import DataOptions, Record
from shape_moe.calibration.responses import pad_token_id, stop_ids
from shape_moe.calibration.seen_prompts import SeenPrompts
from shape_moe.errors import DataError
from shape_moe.evaluation.held_out_set import HeldOutSet
from shape_moe.jobs.session import ModelSession
from shape_moe.units import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HELD_OUT_SAMPLES = 400
"""Records to judge by when nothing else is said."""


def held_out_set(
    session: ModelSession,
    calibrator: ExampleMaker,
    name: str,
    folder: Path | None = None,
    *,
    model: PreTrainedModel | None = None,
) -> HeldOutSet:
    """Tokenise records as the session's are, with answers of the dense model where they lack one.

    Args:
        session: gives the model, and answers of it.
        calibrator: the records: those of the session, or of :meth:`ModelSession.calibrator_of`. It runs once.
        name: what to call the set.
        folder: where answers are kept for a later run, None for nowhere.
        model: knows the model's configuration, where the session's is not in memory; None for the session's.

    Raises:
        DataError: when no record can be used, or none has a token to score.
    """
    examples = calibrator.run(session.answerer, folder)
    if calibrator.skipped:
        first = next(iter(calibrator.skipped.values()))
        left_out = counted(len(calibrator.skipped), "record")
        session.progress.note(f"{name}: {left_out} left out; the first: {first}")
    model = session.model if model is None else model
    group_of = {record.index: record.group for record in calibrator.records}
    return HeldOutSet(
        name=name,
        examples=tuple(examples),
        groups=tuple(group_of[example.index] for example in examples),
        batch_size=session.options.answers.batch_size,
        pad_id=pad_token_id(model, calibrator.tokeniser),
        stops=stop_ids(model),
        vocabulary=vocabulary_size(model),
    )


def fresh_records(data: DataOptions, seen: SeenPrompts, samples: int) -> tuple[list[Record], int]:
    """Records of a source that were not used for calibration, at most ``samples`` of them.

    Args:
        data: the source; its own number of samples is not looked at.
        seen: prompts that calibration has seen.
        samples: how many to use.

    Returns:
        The records, and how many were left out because calibration has seen their prompts.

    Raises:
        DataError: when none is left.
    """
    records = load_records(replace(data, samples=None))
    fresh = [record for record in records if record not in seen]
    if not fresh:
        raise DataError(f"Calibration has seen every example of {data.name}: give other held-out examples.")
    return sample_records(fresh, replace(data, samples=samples)), len(records) - len(fresh)
