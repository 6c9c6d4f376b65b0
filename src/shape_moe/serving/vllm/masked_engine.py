"""A vLLM engine that holds the dense model and answers as pruned ones: one start for all selections."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from shape_moe.architectures.snapshot import Snapshot
from shape_moe.calibration.responses import until_stop
from shape_moe.errors import UnsupportedModelError, UsageError
from shape_moe.selection.selection import Selection, check_against_model
from shape_moe.tracing.vllm_engine import started

_EXTENSION = "shape_moe.serving.vllm.mask_worker.MaskExtension"


class MaskedEngine:
    """Answers prompts greedily, with a selection as a mask on the dense model or without one.

    Args:
        snapshot: the dense model.
        longest: the most tokens of a prompt with its answer.
        dtype: ``auto`` for the checkpoint's.
        engine: further arguments of ``vllm.LLM`` (such as ``tensor_parallel_size``).

    Raises:
        UsageError: for an engine argument that masks decide.
        ShapeMoeError: when vLLM is not installed or cannot load the model.
    """

    def __init__(self, snapshot: Snapshot, longest: int, dtype: str, engine: Mapping[str, Any]) -> None:
        wanted = {
            "dtype": dtype,
            "max_model_len": longest + 1,
            "enforce_eager": True,  # a captured graph would go on without a mask that comes later
            "enable_prefix_caching": False,  # what another mask has left must not be read again
            "worker_extension_cls": _EXTENSION,
            "disable_log_stats": True,
        }
        self.snapshot = snapshot
        self.engine, self.implementation = started(snapshot, wanted, engine, "masks")

    @contextmanager
    def masked(self, selection: Selection) -> Iterator[None]:
        """Answer as the pruned model while this lasts.

        Raises:
            UsageError: when the selection does not fit the model, or its routing cannot be masked here.
            UnsupportedModelError: when a router cannot be masked in this engine.
        """
        moe, routing = self.snapshot.moe, selection.routing
        check_against_model(selection, moe, self.snapshot.moe_layers, routing)
        if routing == "reroute" and moe.router_scores != "softmax":
            raise UsageError(
                f"Routers of {moe.family.model_type} choose by more than a softmax over their logits (a bias, or what "
                "was chosen before), which no mask on logits can overrule: judge routing reroute with --engine "
                "transformers, or routing drop here."
            )
        layers = {str(layer): ids for layer, ids in selection.layers.items()}
        told = self.engine.collective_rpc(
            "shape_moe_mask", args=(layers, selection.num_experts, routing, selection.gate_scale)
        )
        try:
            for refusal in told:
                if refusal is not None:
                    raise UnsupportedModelError(refusal)
            yield
        finally:
            self.engine.collective_rpc("shape_moe_unmask")

    def answers(self, prompts: Sequence[Sequence[int]], limit: int, stops: Collection[int]) -> list[list[int]]:
        """Greedy answers, up to and with the token that ends them.

        Args:
            prompts: their tokens.
            limit: the most tokens of an answer.
            stops: ids of the tokens that end one.
        """
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=limit, stop_token_ids=sorted(stops))
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.engine.generate(given, sampling, use_tqdm=False)
        return [until_stop(list(output.outputs[0].token_ids), frozenset(stops)) for output in outputs]

    def close(self) -> None:
        """End the engine's processes and let go of its memory."""
        core = getattr(getattr(self.engine, "llm_engine", None), "engine_core", None)
        if core is not None:
            core.shutdown()
        del self.engine
