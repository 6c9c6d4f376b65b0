"""``shape-moe evaluate``: what pruning cost, beside the dense model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import shape_moe
from shape_moe.calibration.records import DataOptions
from shape_moe.cli.console import Output
from shape_moe.cli.data_flags import DataFlags
from shape_moe.cli.endpoint_flags import EndpointFlags
from shape_moe.cli.evaluation_shown import show_evaluation
from shape_moe.cli.flag_groups import changed_flags
from shape_moe.cli.flags import REJECTED, ForceFlag, LoadFlags, OutputFlags, RevisionFlag, SeedFlag, StreamFlag
from shape_moe.cli.quality_flags import GenerationFlags, NoGeneral, TaskFlags
from shape_moe.cli.values import share_option
from shape_moe.errors import UsageError
from shape_moe.evaluation.evaluated import Evaluation
from shape_moe.evaluation.footprint import Workload
from shape_moe.evaluation.verdict import MAX_DROP, check_requirement
from shape_moe.jobs.evaluate_endpoints import EndpointOptions
from shape_moe.jobs.evaluate_options import EvaluateOptions
from shape_moe.jobs.held_out import HELD_OUT_SAMPLES
from shape_moe.output_file import OutputFile
from shape_moe.units import share_as_option
from shape_moe.workspace import write_json

ALSO_SAMPLES = 100
HELPS = {"samples": f"Judge by at most this many records. Default: {HELD_OUT_SAMPLES}."}
FIRST = {
    "data": "Examples that nothing was made from.",
    "samples": "",
    "out": "",
    "by": "Judge every value of this field by itself.",
    "also": "Examples of something else than the task.",
    "answer_pattern": "The part that must be right: '#### (.*)'.",
    "generate": "Let models answer N examples freely.",
    "max_drop": "The fall that 'safe' allows. Default: 2%.",
    "tasks": "Benchmarks of lm-evaluation-harness.",
    "endpoint": "Judge servers: dense=URL, then others.",
    "require": "safe or no-loss: exit code 3 if worse.",
    "device": "auto, cpu, cuda or cuda:N.",
    "revision": "Branch, tag or commit of a hub model.",
    "force": "Replace an earlier result.",
    "as_json": "Print one JSON object on stdout.",
    "quiet": "No progress and no notes.",
}
"""What --help shows, shortly; --help-all shows the rest."""


def evaluate(
    data: DataFlags,
    generation: GenerationFlags,
    served: EndpointFlags,
    tasks: TaskFlags,
    hub: RevisionFlag,
    run: LoadFlags,
    stream: StreamFlag,
    seed: SeedFlag,
    force: ForceFlag,
    output: OutputFlags,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="The dense model: a folder, or a model's name on the hub.")
    ] = None,
    candidates: Annotated[
        list[str] | None,
        typer.Argument(metavar="PRUNED", help="Pruned checkpoints, and selections to judge as masks on MODEL."),
    ] = None,
    also: Annotated[
        str | None, typer.Option(metavar="FILE", help="Examples of something else: what was lost besides the task?")
    ] = None,
    by: Annotated[str | None, typer.Option(metavar="FIELD", help="Judge every value of this field by itself.")] = None,
    faithfulness: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Check that the values mean something: compare each selection with its opposite and with N random "
            "ones (3 or more).",
        ),
    ] = 0,
    max_drop: Annotated[
        float,
        share_option(
            "--max-drop",
            "1%",
            help="How far right answers may fall for the verdict 'safe', such as 1% or 0.01. "
            f"Default: {share_as_option(MAX_DROP)}.",
            show_default=False,
        ),
    ] = MAX_DROP,
    require: Annotated[
        str | None,
        typer.Option(metavar="VERDICT", help="safe or no-loss: end with code 3 where a pruned model is judged worse."),
    ] = None,
    judge_minutes: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            help="Judge only a part of the examples if all would take longer than this. Default: all of them.",
        ),
    ] = None,
    no_general: NoGeneral = False,
    trace: Annotated[Path | None, typer.Option(help="The trace that selections were made from.")] = None,
    footprint: Annotated[
        bool,
        typer.Option(
            "--footprint/--no-footprint",
            help="Measure memory, loading time and speed too; only on a machine that does nothing else.",
            show_default=False,
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write every figure into this JSON file.")
    ] = None,
) -> None:
    """Judge pruned models on held-out examples: likelihood, distance to the dense model, answers, benchmarks.

    Example: shape-moe evaluate ./Qwen3-30B-A3B ./Qwen3-gsm8k-0.6 --data gsm8k-test.jsonl --samples 200
    """
    talk = output.output()
    if require is not None:
        check_requirement(require)
        if not served.endpoint and not (candidates and data.data):
            raise UsageError("--require needs pruned models and examples to judge them by (--data).")
    if changed_flags(served):
        named = {"MODEL": model, "PRUNED": candidates, "--also": also, "--faithfulness": faithfulness}
        unused = [name for name, value in named.items() if value] + changed_flags(tasks) + changed_flags(run)
        unused += changed_flags(hub) + changed_flags(stream)
        served.refuse_unused(unused + [name for name in changed_flags(generation) if name == "--generate"], data)
        asked = EndpointOptions(
            models=served.models(),
            by=by,
            answer_pattern=generation.answer_pattern,
            max_new_tokens=generation.answer_tokens,
            max_drop=max_drop,
            general=not no_general,
            trace=str(trace) if trace else None,
            top_logprobs=served.top_logprobs,
            timeout=served.timeout,
            minutes=judge_minutes,
            at_a_time=data.batch_size,
            seed=seed.seed,
        )
        asked_of = data.options(run, seed.seed, HELD_OUT_SAMPLES)
        with OutputFile(out, force=force.force, inputs=[*asked_of.data.files, trace], journal=".answers.jsonl") as file:
            result = shape_moe.evaluate_endpoints(
                served.addresses(), asked_of, asked, journal=file.journal, progress=talk
            )
            _tell(talk, result, out, by_pattern=False)
        _check_required(talk, result, require)
        return
    if model is None:
        raise UsageError(
            "Give the dense model (MODEL), or servers to judge (--endpoint dense=URL --endpoint pruned=URL)."
        )
    options = EvaluateOptions(
        also=DataOptions(also, samples=ALSO_SAMPLES, seed=seed.seed) if also else None,
        by=by,
        generation=generation.options(),
        tasks=tasks.options(),
        footprint=Workload() if footprint else None,
        faithfulness=faithfulness,
        trace=str(trace) if trace else None,
        max_drop=max_drop,
        general=not no_general,
        minutes=judge_minutes,
        seed=seed.seed,
    )
    given = replace(data.options(run, seed.seed, HELD_OUT_SAMPLES), stream=stream.stream) if data.data else None
    if given is None and changed_flags(data):
        raise UsageError(f"{', '.join(changed_flags(data))} says how examples are read: give --data.")
    examples = (*(given.data.files if given else []), *(options.also.files if options.also else []))
    with OutputFile(out, force=force.force, inputs=[model, *(candidates or []), trace, *examples]):
        talk.begin("Checking the model and the examples ...")
        result = shape_moe.evaluate(
            model,
            candidates or [],
            data=given,
            options=options,
            revision=hub.revision,
            device=run.place,
            dtype=run.dtype,
            trust_remote_code=run.trust_remote_code,
            progress=talk,
        )
        _tell(talk, result, out, by_pattern=generation.answer_pattern is not None)
    _check_required(talk, result, require)


def _check_required(talk: Output, result: Evaluation, require: str | None) -> None:
    """End with code 3 where a model is not as good as it was required to be."""
    if require is None:
        return
    worse = [found.name for found in result.models if found.verdict and not found.verdict.satisfies(require)]
    if worse:
        talk.warn(f"Does not meet --require {require}: {', '.join(worse)}.")
        raise typer.Exit(REJECTED)


def _tell(talk: Output, result: Evaluation, out: Path | None, *, by_pattern: bool) -> None:
    """Write the result into its file, and say it."""
    for note in result.warnings:
        talk.warn(note)
    if out is not None:
        write_json(out, result.to_document())
        talk.note(f"Wrote {out}")
    talk.result(result.to_document(), lambda console: show_evaluation(console, result, by_pattern=by_pattern))
