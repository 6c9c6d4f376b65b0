"""Evaluation of a dense model that is read layer by layer: what can be judged so, and the benches for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shape_moe.calibration.example_maker import ExampleMaker
from shape_moe.errors import UsageError
from shape_moe.evaluation.layered_bench import LayeredBench
from shape_moe.jobs.search import layered_bench
from shape_moe.jobs.session import ModelSession

LIKELIHOOD_ALONE = (
    "The dense model is read layer by layer and judged by the likelihood of the right answers; for free answers, tool "
    "calls and general prompts it would have to be in memory."
)


@dataclass(frozen=True)
class NeedsWholeModel:
    """What was asked for that takes the whole model in memory.

    Attributes:
        tasks: benchmarks in this process.
        answer_pattern: exact match of a part of free answers.
    """

    tasks: bool
    answer_pattern: bool

    def refuse(self) -> None:
        """Refuse it.

        Raises:
            UsageError: naming the option, and what to do instead.
        """
        if self.tasks:
            raise UsageError(
                "--tasks runs benchmarks on the whole model, which is not in memory: let vLLM run them "
                "(--task-engine vllm), or leave them out."
            )
        if self.answer_pattern:
            raise UsageError(
                "--answer-pattern judges free answers, for which the whole model has to be in memory: leave it out, or "
                "judge on a machine that holds the model."
            )


def layered_benches(session: ModelSession, sources: Mapping[str, ExampleMaker], seed: int) -> dict[str, LayeredBench]:
    """A bench for each set of examples, by its name.

    Args:
        session: names the dense model and how it runs.
        sources: the examples.
        seed: draws the resamples of intervals.
    """
    return {name: layered_bench(session, maker, maker.data.name, 1, seed, None) for name, maker in sources.items()}
