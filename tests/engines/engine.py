"""One engine in one process: reads a job, starts vLLM, answers every prompt greedily, and reports what it allocated.

Run as ``python engine.py JOB.json RESULT.json``. The job holds ``model``, ``options`` for ``vllm.LLM``, ``prompts``
(lists of token ids) and ``max_tokens``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


class ExpertBytes:
    """Extends vLLM's workers: which expert parameters are allocated."""

    def expert_parameters(self) -> dict[str, tuple[list[int], int]]:
        """Shape and bytes of every expert parameter of this worker, by name."""
        model = self.model_runner.model  # type: ignore[attr-defined]  # an attribute of the worker
        return {
            name: (list(parameter.shape), parameter.numel() * parameter.element_size())
            for name, parameter in model.named_parameters()
            if ".experts." in name
        }


def main() -> None:
    """Carry out one job."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    llm = LLM(job["model"], worker_extension_cls="engine.ExpertBytes", **job["options"])
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], logprobs=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], sampling, use_tqdm=False)
    answers = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        steps = output.outputs[0].logprobs
        answers.append({"tokens": tokens, "logprobs": [s[t].logprob for s, t in zip(steps, tokens, strict=True)]})
    result = {"answers": answers, "experts": llm.collective_rpc("expert_parameters")}
    Path(sys.argv[2]).write_text(json.dumps(result))
    llm.llm_engine.engine_core.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # destructors of vLLM's libraries can abort a process whose work is done


if __name__ == "__main__":
    main()
