"""Options of ``evaluate`` for models that run behind servers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from shape_moe.cli.data_flags import DataFlags
from shape_moe.cli.flag_groups import changed_flags
from shape_moe.cli.values import parse_pairs
from shape_moe.errors import UsageError
from shape_moe.evaluation.served_answers import TOP_LOGPROBS
from shape_moe.openai_server import TIMEOUT_SECONDS

ENDPOINT_PANEL = "Models that are served"
_SERVERS_DECIDE = ("--max-length", "--max-tokens", "--chat-template", "--turns", "--max-new-tokens", "--responses-from")
"""Data options about tokens, which are the server's business."""


@dataclass
class EndpointFlags:
    """The servers, and how they are asked."""

    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=URL",
            help="Instead of MODEL and PRUNED: judge what answers at this OpenAI-compatible server. Repeat it; the one "
            "named dense, else the first, is the reference. A key is taken from OPENAI_API_KEY.",
            rich_help_panel=ENDPOINT_PANEL,
        ),
    ] = None
    endpoint_model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]MODEL",
            help="The model's name on the servers, or on one of them. Default: the first that a server has.",
            rich_help_panel=ENDPOINT_PANEL,
        ),
    ] = None
    top_logprobs: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="How many likely tokens servers name at each step; 0 compares words, without KL.",
            rich_help_panel=ENDPOINT_PANEL,
        ),
    ] = TOP_LOGPROBS
    timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="Give up on a server that takes longer to answer.", rich_help_panel=ENDPOINT_PANEL
        ),
    ] = TIMEOUT_SECONDS

    def addresses(self) -> dict[str, str]:
        """Base addresses by name.

        Raises:
            UsageError: for an entry without a name, and for a name that is given twice.
        """
        given = self.endpoint or []
        found = parse_pairs(given, "--endpoint")
        if len(found) < len(given):
            raise UsageError("Two --endpoint have the same name; give each its own.")
        for name, url in found.items():
            if not name or not url.startswith(("http://", "https://")):
                raise UsageError(f"--endpoint takes NAME=URL such as dense=http://localhost:8000/v1, not {name}={url}.")
        return found

    def models(self) -> dict[str, str]:
        """Names of models by endpoint; the empty name stands for all."""
        names = self.addresses()
        found = {}
        for entry in self.endpoint_model or []:
            name, equals, model = entry.partition("=")
            found.update({name: model} if equals and name in names else {"": entry})
        return found

    def refuse_unused(self, unused: list[str], data: DataFlags) -> None:
        """Refuse options that change nothing where servers answer.

        Raises:
            UsageError: naming them.
        """
        unused = unused + [name for name in changed_flags(data) if name in _SERVERS_DECIDE]
        if unused:
            raise UsageError(f"{', '.join(unused)} has no effect on what a server answers: leave it out.")
