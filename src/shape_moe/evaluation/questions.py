"""What models are asked beside the examples: turns at which tools are offered, and general prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shape_moe.calibration.records import Record
from shape_moe.calibration.seen_prompts import SeenPrompts
from shape_moe.evaluation.forgotten import Forgotten, GeneralCheck, general_records, kept_groups
from shape_moe.evaluation.outcomes import FREE_ANSWERS
from shape_moe.evaluation.spread import spread_over_classes
from shape_moe.evaluation.tool_calls import ToolExample
from shape_moe.evaluation.tool_check import ToolCheck, calls_tools, tool_prompts
from shape_moe.progress import SILENT, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shape_moe.calibration.examples import Tokeniser


@dataclass(frozen=True)
class Replies:
    """What a model made of the questions, beside the dense one.

    Attributes:
        calls: what both models do where tools are offered, by the example's position; None where none are.
        forgotten: what became of general prompts, None where they were not asked.
    """

    calls: dict[int, ToolExample] | None = None
    forgotten: Forgotten | None = None


class Questions:
    """The questions, answered by the dense model at once.

    Args:
        model: the dense model.
        tokeniser: turns records into prompts.
        records: the record of each example of the set that is judged by.
        general: ask at most so many general prompts, of every kind as many; None for all.
        most: ask at most so many examples that offer tools.
        batch_size: prompts per batch.
        progress: where to show progress.

    Attributes:
        calling: positions of the examples whose answer calls a tool.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokeniser: Tokeniser,
        records: Sequence[Record],
        *,
        general: int | None = None,
        most: int = FREE_ANSWERS,
        batch_size: int = 8,
        progress: Progress = SILENT,
    ) -> None:
        self.calling = frozenset(i for i, record in enumerate(records) if calls_tools(record))
        self.progress = progress
        self._tools: ToolCheck | None = None
        self._general: GeneralCheck | None = None
        prompts = tool_prompts(records, most)
        if prompts:
            with progress.phase("Dense model on records with tools", len(prompts), "prompt") as advance:
                self._tools = ToolCheck(model, tokeniser, prompts, batch_size=batch_size, advance=advance)
        asked = general_records()
        if general is not None:
            groups = [record.group for record in asked]
            asked = [asked[i] for i in spread_over_classes(groups, range(len(asked)), general)]
        if asked:
            with progress.phase("Dense model on general prompts", len(asked), "prompt") as advance:
                self._general = GeneralCheck(model, tokeniser, batch_size=batch_size, records=asked, advance=advance)

    def close(self) -> None:
        """Let go of what the dense model said."""
        if self._general is not None:
            self._general.close()

    def ask(self, model: PreTrainedModel, name: str, seen: SeenPrompts | None = None) -> Replies:
        """Ask another model.

        Args:
            model: the model, masked or loaded from a checkpoint.
            name: what it is called.
            seen: the prompts that it was calibrated with, None where they are not known.
        """
        calls = forgotten = None
        if self._tools is not None:
            with self.progress.phase(f"{name} on records with tools", len(self._tools.prompts), "prompt") as advance:
                calls = self._tools.compare(model, advance)
        if self._general is not None:
            with self.progress.phase(f"{name} on general prompts", len(self._general.records), "prompt") as advance:
                forgotten = self._general.compare(model, advance, kept=kept_groups(seen) if seen else ())
        return Replies(calls, forgotten)
