"""Tracing with a vLLM engine: the same calibration set, the same artifact, coalitions and counts alone."""

from __future__ import annotations

from pathlib import Path

from shape_moe.errors import UsageError
from shape_moe.jobs.session import ModelSession
from shape_moe.tracing.trace import Trace
from shape_moe.tracing.vllm_engine import VllmTracer


def trace_with_vllm(session: ModelSession, folder: Path | None) -> Trace:
    """Answer prompts and trace with vLLM.

    Args:
        session: model on disk, calibration set and options.
        folder: where answers are kept for a later run, None for nowhere.

    Raises:
        UsageError: for a live model.
        ShapeMoeError: when vLLM is missing, cannot load the model, or its routing cannot be observed.
    """
    snapshot, options = session.snapshot, session.options
    if snapshot is None:
        raise UsageError("--engine vllm loads a model from disk; give its folder or name.")
    engine = _Engine(session)
    examples = session.calibrator.run(lambda: engine.tracer.answer, folder)
    tracer = engine.tracer
    with session.progress.phase("Tracing", sum(len(example.tokens) for example in examples), "token") as advance:
        tracer.trace(examples, advance)
    info = session.info(snapshot.moe, tuple(snapshot.moe_layers), tracer.implementation, options.dtype, "vllm")
    return Trace(info, tracer.statistics, tracer.coalitions)


class _Engine:
    """The engine, started when it is first needed: for answers, or once all examples are there."""

    def __init__(self, session: ModelSession) -> None:
        self.session = session
        self._tracer: VllmTracer | None = None

    @property
    def tracer(self) -> VllmTracer:
        if self._tracer is None:
            session = self.session
            assert session.snapshot is not None
            with session.progress.phase("Starting vLLM", 1, "engine") as advance:
                options = session.options
                longest = session.calibrator.longest()
                self._tracer = VllmTracer(session.snapshot, longest, options.dtype, options.engine_args)
                advance(1)
        return self._tracer
