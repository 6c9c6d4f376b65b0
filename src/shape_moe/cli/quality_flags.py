"""Options that say how quality is judged, and how much of it may be lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from shape_moe.calibration.records import DataOptions
from shape_moe.cli.data_flags import DataFlags
from shape_moe.cli.flag_groups import changed_flags
from shape_moe.cli.values import parse_values, share_option
from shape_moe.errors import UsageError
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.harness import TaskOptions
from shape_moe.evaluation.keep_rate import Limit

LIMIT_PANEL = "What may be lost"
GENERATION_PANEL = "Free answers"
TASK_PANEL = "Benchmark tasks"

NoGeneral = Annotated[
    bool,
    typer.Option("--no-general", help="Ask no general prompts, which show what was forgotten besides the task."),
]
"""Of every verb that judges."""


@dataclass
class HeldOutFlags:
    """The examples that candidates are judged by."""

    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Judge by these examples. Default: a share of --data.", rich_help_panel=LIMIT_PANEL
        ),
    ] = None
    held_out_samples: Annotated[
        int | None,
        typer.Option(help="Judge by at most this many examples.", rich_help_panel=LIMIT_PANEL),
    ] = None

    def data(self, data: DataFlags, seed: int) -> DataOptions | None:
        """The examples, read as ``data`` says, None for a share of those."""
        return data.held_out(self.held_out, seed) if self.held_out else None


@dataclass
class LimitFlags:
    """What a pruned model may lose."""

    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Limit on the KL divergence to the dense model (how much its predictions change), in nats per token.",
            rich_help_panel=LIMIT_PANEL,
        ),
    ] = None
    max_drop: Annotated[
        float | None,
        share_option(
            "--max-drop",
            "1%",
            help="Limit on the fall of right answers (exact match), such as 1% or 0.01.",
            rich_help_panel=LIMIT_PANEL,
        ),
    ] = None

    def limit(self) -> Limit | None:
        """The limit that these flags describe, None for none."""
        if self.max_kl is not None and self.max_drop is not None:
            raise UsageError("--max-kl and --max-drop exclude each other; give one of them.")
        if self.max_kl is not None:
            return Limit("max_kl", self.max_kl)
        return Limit("max_drop", self.max_drop) if self.max_drop is not None else None


@dataclass
class GenerationFlags:
    """How models answer freely."""

    generate: Annotated[
        int,
        typer.Option(
            metavar="N", help="Let models answer N examples freely; 0 for none.", rich_help_panel=GENERATION_PANEL
        ),
    ] = 64
    answer_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest answer. Default: a quarter more than the longest response.", rich_help_panel=GENERATION_PANEL
        ),
    ] = None
    answer_pattern: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="The part of an answer that must be right, for example '#### (.*)'. Default: all of it.",
            rich_help_panel=GENERATION_PANEL,
        ),
    ] = None

    def options(self) -> GenerationOptions | None:
        """The generation options that these flags describe, None for no free answers."""
        if self.generate == 0:
            return None
        return GenerationOptions(self.generate, self.answer_tokens, self.answer_pattern)

    def required(self) -> GenerationOptions:
        """The same, where nothing is chosen without free answers."""
        options = self.options()
        if options is None:
            raise UsageError(
                "A model is recommended only after it has answered freely: --generate must be at least 1 here."
            )
        return options


@dataclass
class TaskFlags:
    """Tasks of lm-evaluation-harness."""

    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASKS",
            help="Tasks of lm-evaluation-harness by name, with commas between, or YAML files that define one.",
            rich_help_panel=TASK_PANEL,
        ),
    ] = None
    limit: Annotated[
        int | None, typer.Option(help="The first N items of every task only.", rich_help_panel=TASK_PANEL)
    ] = None
    fewshot: Annotated[
        int | None, typer.Option(help="Examples in the prompt. Default: the task's own.", rich_help_panel=TASK_PANEL)
    ] = None
    apply_chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="Ask through the chat template.", rich_help_panel=TASK_PANEL),
    ] = False
    unsafe_code: Annotated[
        bool,
        typer.Option("--unsafe-code", help="Run tasks that execute what the model writes.", rich_help_panel=TASK_PANEL),
    ] = False
    engine: Annotated[
        str, typer.Option(help="What runs the tasks: transformers or vllm.", rich_help_panel=TASK_PANEL)
    ] = "transformers"
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Argument of vllm.LLM, for example tensor_parallel_size=2.",
            rich_help_panel=TASK_PANEL,
        ),
    ] = None

    def options(self) -> TaskOptions | None:
        """The task options that these flags describe, None for no tasks."""
        if self.tasks is None:
            if changed_flags(self):
                raise UsageError(f"{', '.join(changed_flags(self))} has no effect without --tasks.")
            return None
        return TaskOptions(
            names=tuple(name.strip() for name in self.tasks.split(",") if name.strip()),
            limit=self.limit,
            num_fewshot=self.fewshot,
            chat_template=self.apply_chat_template,
            unsafe_code=self.unsafe_code,
            engine=self.engine,
            engine_args=parse_values(self.engine_arg, "--engine-arg"),
        )
