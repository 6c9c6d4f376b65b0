"""``shape-moe serve``: the original checkpoint in vLLM, with a selection applied while it loads."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from shape_moe.cli.flags import ForceFlag, ModelArgument, RevisionFlag
from shape_moe.errors import ServingError, UsageError
from shape_moe.literal_paths import check_plain

PLUGIN = "shape-moe"
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(
    context: typer.Context,
    model: ModelArgument,
    selection: Annotated[Path, typer.Option(help="The selection to apply, or a folder that holds one.")],
    force: ForceFlag,
    hub: RevisionFlag,
) -> None:
    """Serve MODEL with vLLM as if it had been pruned: dropped experts are neither loaded nor allocated.

    Nothing is written. All other options go to `vllm serve` as they are; MODEL comes first.

    Example: shape-moe serve Qwen/Qwen3-30B-A3B --selection gsm8k.json --tensor-parallel-size 2
    """
    if model.startswith("-"):
        raise UsageError("MODEL comes first: shape-moe serve MODEL --selection SELECTION [options of vllm serve].")
    if any(argument.split("=", maxsplit=1)[0] == "--hf-overrides" for argument in context.args):
        raise UsageError("shape-moe serve itself passes --hf-overrides to vLLM; leave it out.")
    check_plain(model, "vLLM")
    command = _vllm_command()
    from shape_moe.serving.vllm import overrides

    settings = json.dumps(overrides(model, selection, revision=hub.revision, force=force.force), separators=(",", ":"))
    pinned = ["--revision", hub.revision] if hub.revision else []
    arguments = [command, "serve", model, "--hf-overrides", settings, *pinned, *context.args]
    sys.stdout.flush()
    os.execv(command, arguments)  # noqa: S606  # this process becomes the server


def _vllm_command() -> str:
    """The command ``vllm`` of this environment, once it is sure that it will find the plugin.

    Raises:
        ServingError: when there is none, or when it would start without the plugin.
    """
    beside = Path(sys.executable).with_name("vllm")
    command = str(beside) if beside.is_file() else shutil.which("vllm")
    if command is None:
        raise ServingError("There is no vLLM here: install it beside this package (pip install vllm==0.32.0).")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise ServingError(f"VLLM_PLUGINS={allowed!r} keeps the plugin out: add {PLUGIN} to it, or unset it.")
    try:
        installed = version("vllm")
    except PackageNotFoundError:
        return command  # another environment's; the plugin checks the version there
    from shape_moe.serving.vllm.startup import check_version

    check_version(installed)
    return command
