"""What runs inside a vLLM worker while it traces: routed experts are counted where they are computed.

The class below is mixed into vLLM's worker (``worker_extension_cls``); its methods are called from outside through
``collective_rpc``. Nothing of a token leaves the worker but the counts of its coalitions.
"""

from __future__ import annotations

import io
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.calibration.batches import CELLS, FOLDS, RESPONSE, SEGMENTS
from shape_moe.errors import UnsupportedModelError
from shape_moe.tracing.coalitions import CoalitionTable, merge_tables, tabulate

Sequence = tuple[list[int], list[list[int]], int, int]
"""Tokens, half-open ranges of them that are response, and the fold and the class of the example."""
_TABLES_AT_MOST = 64


class CoalitionCounter:
    """Counts coalitions and routed tokens by class, cell and fold.

    Args:
        layers: decoder-layer indices of the MoE layers.
        num_experts: routed experts.
        sequences: what will be run, each in one piece; how a sequence is recognised.
    """

    def __init__(self, layers: Iterable[int], num_experts: int, sequences: Iterable[Sequence]) -> None:
        self.num_experts = num_experts
        self._waiting: dict[tuple[int, ...], deque[tuple[list[list[int]], int, int]]] = defaultdict(deque)
        classes = 1
        for tokens, spans, fold, number in sequences:
            self._waiting[tuple(tokens)].append((spans, fold, number))
            classes = max(classes, number + 1)
        self._tables: dict[int, list[CoalitionTable]] = {layer: [] for layer in layers}
        self.tokens = {
            layer: np.zeros((classes, len(CELLS), FOLDS, num_experts), dtype=np.int64) for layer in self._tables
        }

    def add(self, input_ids: NDArray[np.int64], positions: NDArray[np.int64], routed: Mapping[int, Any]) -> None:
        """Count one forward pass.

        Args:
            input_ids: int [T], whole sequences one after the other.
            positions: int [T], each token's position in its sequence.
            routed: by layer, what its router gave: one int [T, k] per call.

        Raises:
            UnsupportedModelError: when a sequence came in pieces or is not one of those announced, or when a router
                did not report every token once.
        """
        segments, predicting, folds, classes = self._places(input_ids, positions)
        cells = len(SEGMENTS) * segments + predicting
        for layer, tables in self._tables.items():
            calls = routed.get(layer, [])
            if len(calls) != 1 or len(calls[0]) != len(input_ids):
                raise UnsupportedModelError(
                    f"Layer {layer}: the router reported {sum(map(len, calls))} of {len(input_ids)} tokens; its kernel "
                    "bypasses the report, or tokens are split over workers. Trace without expert or data parallelism, "
                    "with another MoE backend, or with --engine transformers."
                )
            ids = np.asarray(calls[0])
            tables.append(tabulate(ids, segments, folds, predicting, classes))
            np.add.at(self.tokens[layer], (classes[:, None], cells[:, None], folds[:, None], ids), 1)
            if len(tables) > _TABLES_AT_MOST:
                tables[:] = [merge_tables(tables, [1.0] * len(tables))]

    def _places(
        self, input_ids: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Segment, whether the next token is response, fold and class of every token of a pass."""
        segments, predicting, folds, classes = (np.zeros(len(input_ids), dtype=np.int64) for _ in range(4))
        spans = list(pairwise([*np.flatnonzero(positions == 0).tolist(), len(input_ids)]))
        whole = all(np.array_equal(positions[begin:end], np.arange(end - begin)) for begin, end in spans)
        if not spans or spans[0][0] != 0 or not whole:
            raise UnsupportedModelError("vLLM ran a sequence in pieces; switch chunked prefill and prefix caching off.")
        for begin, end in spans:
            known = self._waiting.get(tuple(input_ids[begin:end].tolist()))
            if not known:
                raise UnsupportedModelError("vLLM ran a sequence that was not sent, or one of them twice.")
            responses, folds[begin:end], classes[begin:end] = known.popleft()
            for first, after in responses:
                segments[begin + first : begin + after] = RESPONSE
                predicting[max(begin + first - 1, begin) : begin + after - 1] = 1
        return segments, predicting, folds, classes

    def result(self) -> dict[str, dict[str, bytes]]:
        """By layer: its coalition table's arrays, and tokens by expert, as ``.npy`` bytes."""
        found = {}
        for layer, tables in self._tables.items():
            table = merge_tables(tables, [1.0] * len(tables))
            arrays = {
                "members": table.members,
                "counts": table.counts,
                "classes": table.classes,
                "tokens": self.tokens[layer],
            }
            found[str(layer)] = {name: to_bytes(array) for name, array in arrays.items()}
        return found


def to_bytes(array: NDArray[Any]) -> bytes:
    """An array as ``.npy`` bytes."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def from_bytes(data: bytes) -> NDArray[Any]:
    """The array of ``.npy`` bytes."""
    array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    return array


class RoutingTraceExtension:
    """Methods that a vLLM worker gains. Errors are handed over as text: one that is raised here ends the engine."""

    model_runner: Any
    vllm_config: Any

    def shape_moe_begin(self, layers: list[int], num_experts: int, sequences: list[Any]) -> str | None:
        """Count every forward pass from now on; the reason where this worker's routers cannot be observed."""
        try:
            from vllm.model_executor.layers.fused_moe.layer import MoERunner
            from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
        except ImportError:
            return (
                "This version of vLLM keeps its routers elsewhere; docs/serving.md names the versions that were tested."
            )
        parallel = self.vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1 or parallel.data_parallel_size > 1 or parallel.enable_expert_parallel:
            return "Tracing with vLLM works with tensor parallelism alone: no pipeline, data or expert parallelism."
        model = self.model_runner.model
        runners = [m for m in model.modules() if isinstance(m, MoERunner) and m.layer_id in layers]
        for runner in runners:
            if not isinstance(runner.router, BaseRouter) or runner._quant_method.is_monolithic:  # noqa: SLF001 -- vLLM's own capturer asks it too
                return (
                    f"Layer {runner.layer_id} routes inside its kernel, where nothing can be observed; choose another "
                    "MoE backend, or trace with --engine transformers."
                )
        self._shape_moe_counter = CoalitionCounter(layers, num_experts, sequences)
        self._shape_moe_routed: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
        self._shape_moe_error: str | None = None
        self._shape_moe_routers = [runner.router for runner in runners]
        for runner in runners:
            runner.router.set_capture_fn(self._shape_moe_capture(runner.layer_id))
        self._shape_moe_hook = model.register_forward_hook(self._shape_moe_after, with_kwargs=True)
        return None

    def _shape_moe_capture(self, layer: int) -> Any:
        def capture(ids: Any) -> None:
            self._shape_moe_routed[layer].append(ids.detach().to("cpu").numpy().astype(np.int64))

        return capture

    def _shape_moe_after(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        given = dict(zip(("input_ids", "positions"), args, strict=False)) | kwargs
        routed, self._shape_moe_routed = self._shape_moe_routed, defaultdict(list)
        if given.get("input_ids") is None or given["positions"].ndim != 1:
            self._shape_moe_error = "vLLM runs this model on embeddings, not on token ids alone; it cannot be traced."
            return
        try:
            self._shape_moe_counter.add(given["input_ids"].cpu().numpy(), given["positions"].cpu().numpy(), routed)
        except UnsupportedModelError as error:
            self._shape_moe_error = self._shape_moe_error or str(error)

    def shape_moe_end(self) -> dict[str, dict[str, bytes]] | str | None:
        """Stop counting.

        Returns:
            The counts on the first worker of a tensor-parallel group, None on the others; a text says what went wrong.
        """
        from vllm.distributed import get_tensor_model_parallel_rank

        for router in self._shape_moe_routers:
            router.set_capture_fn(None)
        self._shape_moe_hook.remove()
        if self._shape_moe_error is not None:
            return self._shape_moe_error
        return self._shape_moe_counter.result() if get_tensor_model_parallel_rank() == 0 else None
