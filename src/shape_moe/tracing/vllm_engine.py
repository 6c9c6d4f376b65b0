"""A vLLM engine that traces: coalitions of a calibration set, counted inside its workers.

Every example runs through the engine once, as a prompt (its answer included), so each token is routed exactly as in the
teacher-forced pass of the Transformers tracer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.architectures.snapshot import Snapshot
from shape_moe.calibration.batches import FOLDS
from shape_moe.calibration.examples import Example, Tokeniser
from shape_moe.calibration.records import Record
from shape_moe.errors import ShapeMoeError, UnsupportedModelError, UsageError, first_line
from shape_moe.literal_paths import plain_model
from shape_moe.tracing.classes import NO_CLASS, classes_of
from shape_moe.tracing.coalitions import CoalitionTable
from shape_moe.tracing.engine import Work, register
from shape_moe.tracing.trace import Trace
from shape_moe.tracing.vllm_worker import from_bytes

Progress = Callable[[int], None]
_EXTENSION = "shape_moe.tracing.vllm_worker.RoutingTraceExtension"
_REQUESTS_PER_CALL = 256


class VllmTracer:
    """An engine that answers prompts and counts coalitions.

    Args:
        snapshot: the model; dense, not pruned.
        longest: the most tokens of an example, answer included.
        dtype: ``auto`` for the checkpoint's.
        engine: further arguments of ``vllm.LLM`` (such as ``tensor_parallel_size``).

    Attributes:
        statistics: ``tokens`` [layer, class, cell, fold, expert], once :meth:`trace` has run.
        coalitions: the table of every MoE layer.
        implementation: engine and version, for the trace.

    Raises:
        UsageError: for an engine argument that the tracer decides.
        ShapeMoeError: when vLLM is not installed or cannot load the model.
    """

    def __init__(self, snapshot: Snapshot, longest: int, dtype: str, engine: Mapping[str, Any]) -> None:
        wanted = {
            "dtype": dtype,
            "max_model_len": longest + 1,
            "max_num_batched_tokens": max(8192, longest + 1),
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "enable_chunked_prefill": False,
            "worker_extension_cls": _EXTENSION,
            "disable_log_stats": True,
        }
        # an example that fills the context needs room for one token more, which is sampled but never run
        os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
        self.snapshot = snapshot
        self.statistics: dict[str, NDArray[Any]] = {}
        self.coalitions: dict[int, CoalitionTable] = {}
        self.engine, self.implementation = started(snapshot, wanted, engine, "the tracer")

    def answer(
        self,
        tokeniser: Tokeniser,
        records: Sequence[Record],
        *,
        max_new_tokens: int,
        known: Mapping[int, list[int]],
        keep: Callable[[dict[int, list[int]]], None],
        progress: Progress,
    ) -> dict[int, list[int]]:
        """Let the model answer prompts greedily; the same contract as ``calibration.responses.generate_answers``."""
        from vllm import SamplingParams

        answers = dict(known)
        missing = [record for record in records if record.index not in answers]
        for start in range(0, len(missing), _REQUESTS_PER_CALL):
            rows = missing[start : start + _REQUESTS_PER_CALL]
            prompts = [tokeniser.prompt(record) for record in rows]
            room = [tokeniser.room(len(prompt), max_new_tokens) for prompt in prompts]
            asked = [i for i, tokens in enumerate(room) if tokens]
            outputs = self.engine.generate(
                [{"prompt_token_ids": prompts[i]} for i in asked],
                [SamplingParams(temperature=0, max_tokens=room[i]) for i in asked],
                use_tqdm=False,
            )
            answers |= {record.index: [] for record in rows}
            answers |= {
                rows[i].index: list(output.outputs[0].token_ids) for i, output in zip(asked, outputs, strict=True)
            }
            keep(answers)
            progress(len(rows))
        return answers

    def trace(self, examples: Sequence[Example], progress: Progress) -> None:
        """Run examples and count.

        Raises:
            UnsupportedModelError: when routing cannot be observed in this engine.
        """
        from vllm import SamplingParams

        moe, layers, classes = self.snapshot.moe, list(self.snapshot.moe_layers), classes_of(examples)
        sequences = [
            (
                list(e.tokens),
                [list(span) for span in e.spans],
                position % FOLDS,
                classes.index(e.group or NO_CLASS),
            )
            for position, e in enumerate(examples)
        ]
        refusals = self.engine.collective_rpc("shape_moe_begin", args=(layers, moe.num_experts, sequences))
        for refusal in refusals:
            if refusal is not None:
                raise UnsupportedModelError(refusal)
        once = SamplingParams(temperature=0, max_tokens=1)
        for start in range(0, len(sequences), _REQUESTS_PER_CALL):
            rows = sequences[start : start + _REQUESTS_PER_CALL]
            self.engine.generate([{"prompt_token_ids": tokens} for tokens, *_ in rows], once, use_tqdm=False)
            progress(sum(len(tokens) for tokens, *_ in rows))
        results = [result for result in self.engine.collective_rpc("shape_moe_end") if result is not None]
        for result in results:
            if isinstance(result, str):
                raise UnsupportedModelError(result)
        self._take(results[0], layers)

    def _take(self, result: dict[str, dict[str, bytes]], layers: list[int]) -> None:
        arrays = {layer: {name: from_bytes(data) for name, data in result[str(layer)].items()} for layer in layers}
        self.coalitions = {
            layer: CoalitionTable(found["members"], found["counts"], found["classes"])
            for layer, found in arrays.items()
        }
        tokens = np.stack([found["tokens"] for found in arrays.values()])
        # every routed token fills k slots, so the tokens of a layer follow from those of its experts
        layer_tokens = tokens.sum(axis=-1) // self.snapshot.moe.top_k
        self.statistics = {"tokens": tokens, "layer_tokens": layer_tokens}


def started(
    snapshot: Snapshot, wanted: Mapping[str, Any], engine: Mapping[str, Any], decided_by: str
) -> tuple[Any, str]:
    """An engine for a model, and what to call it.

    Args:
        snapshot: the model on disk.
        wanted: arguments of ``vllm.LLM`` that its use needs; the user may set ``max_num_batched_tokens`` alone.
        engine: the user's arguments.
        decided_by: whose use it is, for messages.

    Raises:
        UsageError: for an argument that is decided already.
        ShapeMoeError: when vLLM is not installed or cannot load the model.
    """
    fixed = sorted(set(engine) & (set(wanted) - {"max_num_batched_tokens"}))
    if fixed:
        raise UsageError(f"The engine argument {fixed[0]} is decided by {decided_by}; leave it out.")
    try:
        import vllm
    except ImportError as error:
        raise ShapeMoeError(
            "--engine vllm needs vLLM in this environment: pip install vllm==0.32.0, or use --engine transformers."
        ) from error
    try:
        with plain_model(snapshot.path) as name:  # vLLM reads patterns into the names of folders
            return vllm.LLM(model=name, **{**wanted, **engine}), f"vllm {vllm.__version__}"
    except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        raise ShapeMoeError(f"vLLM cannot load {snapshot.name}: {first_line(error)}") from error


def _counts() -> tuple[str, ...]:
    return ("tokens", "layer_tokens")


@register("vllm", gives=_counts, takes_arguments=True)
class VllmEngine:
    """Answers prompts and traces with vLLM: the same calibration set, the same artifact, coalitions and counts alone.

    The engine is started when it is first needed: for answers, or once all examples are there. Only answers are kept
    for a run that goes on; counting begins anew.

    Args:
        work: the model on disk and the examples.

    Raises:
        UsageError: for a live model.
    """

    def __init__(self, work: Work) -> None:
        if work.snapshot is None:
            raise UsageError("--engine vllm loads a model from disk; give its folder or name.")
        self.work, self.snapshot = work, work.snapshot
        self._tracer: VllmTracer | None = None

    def fill(self, folder: Path | None) -> Trace:
        """Answer, tokenise and trace; see :class:`shape_moe.tracing.engine.Filler`.

        Raises:
            ShapeMoeError: when vLLM is missing, cannot load the model, or its routing cannot be observed.
        """
        work, snapshot = self.work, self.snapshot
        examples = work.examples.run(lambda: self._started().answer, folder)
        tracer = self._started()
        with work.progress.phase("Tracing", sum(len(example.tokens) for example in examples), "token") as advance:
            tracer.trace(examples, advance)
        info = work.describe(snapshot.moe, tuple(snapshot.moe_layers), tracer.implementation, work.dtype, "vllm")
        return Trace(replace(info, classes=classes_of(examples)), tracer.statistics, tracer.coalitions)

    def _started(self) -> VllmTracer:
        if self._tracer is None:
            with self.work.progress.phase("Starting vLLM", 1, "engine") as advance:
                longest = self.work.examples.longest()
                self._tracer = VllmTracer(self.snapshot, longest, self.work.dtype, self.work.arguments)
                advance(1)
        return self._tracer
