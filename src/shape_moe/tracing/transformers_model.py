"""Trace a live Transformers model: hooks in, batches through, hooks out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shape_moe.architectures.loading import input_device
from shape_moe.architectures.sites import MoeSite, find_sites, live_moe_config
from shape_moe.errors import ShapeMoeError, UnsupportedModelError, first_line
from shape_moe.tracing.batch_context import BatchContext
from shape_moe.tracing.classes import NO_CLASS
from shape_moe.tracing.experts import (
    GROUPED_DTYPES,
    RECORDER_ATTRIBUTE,
    TRACED_GROUPED,
    expert_outputs,
    recorder_of,
    register_traced_experts,
)
from shape_moe.tracing.recorder import LayerRecorder
from shape_moe.tracing.replacement import wider_choice
from shape_moe.tracing.statistics import Statistic, fitting, statistics
from shape_moe.tracing.stream_check import JoinWatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shape_moe.calibration.batches import Batch
    from shape_moe.tracing.coalitions import CoalitionTable
    from shape_moe.tracing.stored_statistics import Array


class ModelTracer:
    """Records the routing of a model over batches; use it inside :meth:`attached`.

    Args:
        model: a Transformers causal language model with MoE layers.
        recorded: the statistics to record, None for all that are installed.
        classes: names of the classes of examples to keep apart.

    Attributes:
        left_out: statistics that would be too large and are not recorded, and why.
        implementation: the experts implementation whose logits a traced forward reproduces bit for bit.
        batches: number of batches traced.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recorded: Sequence[Statistic] | None = None,
        classes: Sequence[str] = (NO_CLASS,),
    ) -> None:
        self.model, self.classes = model, tuple(classes)
        self.moe = live_moe_config(model)
        self.sites = find_sites(model)
        wanted = tuple(statistics().values() if recorded is None else recorded)
        wanted = tuple(s for s in wanted if self.moe.has_gate_scale or not s.gate_scale)
        self.recorded, self.left_out = fitting(wanted, len(self.sites), len(self.classes), self.moe.num_experts)
        if self.moe.family.untraceable is not None:
            raise UnsupportedModelError(
                f"{self.moe.family.model_type} cannot be traced: {self.moe.family.untraceable}. A selection that was "
                "made in another way can be applied (shape-moe prune --selection)."
            )
        if self.moe.family.router_scores == "other":
            self._leave_out_next_choice("its router's scores depend on the experts chosen before")
        top_k = self.moe.family.router_top_k
        if not all(hasattr(site.router, top_k) for site in self.sites):
            self._leave_out_next_choice(f"the routers of {type(model).__name__} have no attribute {top_k}")
        self.implementation = "grouped_mm" if _can_choose_experts(model) else "eager"
        self.recorders = [
            LayerRecorder(
                site.layer,
                self.moe,
                self.recorded,
                len(self.classes),
            )
            for site in self.sites
        ]
        self.batches = 0
        self._failed = False

    def _leave_out_next_choice(self, reason: str) -> None:
        self.left_out |= {s.name: reason for s in self.recorded if s.next_choice}
        self.recorded = tuple(s for s in self.recorded if not s.next_choice)

    @property
    def dtype(self) -> str:
        """Dtype of the experts' weights."""
        return str(next(self.sites[0].experts.parameters()).dtype).removeprefix("torch.")

    @contextmanager
    def attached(self) -> Iterator[ModelTracer]:
        """Install the hooks and the traced experts; give the model back as it was."""
        before = self.model.config._experts_implementation  # noqa: SLF001  # no public name
        training = [module for module in self.model.modules() if module.training]
        hooks: list[Any] = []
        try:
            for site, recorder in zip(self.sites, self.recorders, strict=True):
                hooks += _hook(site, recorder)
                setattr(site.experts, RECORDER_ATTRIBUTE, recorder)
            if self.implementation == "grouped_mm":
                register_traced_experts()
                self.model.set_experts_implementation(TRACED_GROUPED)
            else:
                self.model.set_experts_implementation("eager")
                hooks += [site.experts.register_forward_pre_hook(_replay) for site in self.sites]
            self.model.eval()
            yield self
        finally:
            self.model.set_experts_implementation(before)
            for module in training:
                module.training = True
            for hook in hooks:
                hook.remove()
            for site in self.sites:
                if hasattr(site.experts, RECORDER_ATTRIBUTE):
                    delattr(site.experts, RECORDER_ATTRIBUTE)

    @torch.no_grad()
    def add(self, batch: Batch, *, logits_to_keep: int = 0) -> torch.Tensor:
        """Trace one batch.

        Args:
            batch: the batch.
            logits_to_keep: compute logits for this many last positions only; 0 for all.

        Returns:
            The logits [B, T, V] of the traced forward pass.

        Raises:
            ShapeMoeError: when the pass cannot be recorded faithfully.
        """
        with self.recording(batch):
            logits = self._forward(batch, logits_to_keep)
        self.batches += 1
        return logits

    @contextmanager
    def recording(self, batch: Batch, layer: int | None = None) -> Iterator[None]:
        """Record what runs meanwhile as the pass of one batch.

        Args:
            batch: the batch.
            layer: the decoder layer that the batch goes through, None for all of them. A layer without routed experts
                leaves nothing to record.

        Raises:
            ShapeMoeError: when the pass cannot be recorded faithfully.
        """
        context = BatchContext.of(batch, self.classes)
        recorders = [recorder for recorder in self.recorders if layer in (None, recorder.layer)]
        try:
            for recorder in recorders:
                recorder.start(context)
            yield
            for recorder in recorders:
                recorder.finish()
        except BaseException:
            self._failed = True  # some layers have added the batch, others have not
            for recorder in recorders:
                recorder.context = None
            raise

    @torch.no_grad()
    def failure(self, batch: Batch) -> str | None:
        """Why a batch cannot be traced, found by running it unrecorded; None when it can."""
        try:
            logits = self._forward(batch, 0)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return first_line(error)
        real = (batch.attention_mask > 0).to(logits.device)
        return None if bool(torch.isfinite(logits[real]).all()) else "its logits are not finite"

    def _forward(self, batch: Batch, logits_to_keep: int) -> torch.Tensor:
        device = input_device(self.model)
        output = self.model(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            use_cache=False,
            logits_to_keep=logits_to_keep,
        )
        logits: torch.Tensor = output.logits
        return logits

    def run(self, batches: Iterable[Batch]) -> None:
        """Trace several batches."""
        with self.attached():
            for batch in batches:
                self.add(batch)

    def statistics(self) -> dict[str, Array]:
        """Every recorded statistic with its layer axis first, over all batches so far."""
        self._check_whole()
        layers = [recorder.statistics() for recorder in self.recorders]
        return {s.name: np.stack([layer[s.name] for layer in layers]) for s in self.recorded}

    def coalitions(self) -> dict[int, CoalitionTable]:
        """The coalition table of every layer, over all batches so far."""
        return {recorder.layer: recorder.coalitions() for recorder in self.recorders}

    def state(self) -> dict[str, Array]:
        """Sums and coalition tables of every layer as they are after the batches so far."""
        self._check_whole()
        return {f"{r.layer}.{name}": array for r in self.recorders for name, array in r.state().items()}

    def restore(self, state: Mapping[str, Array], batches: int) -> None:
        """Go on from a state after so many batches: what follows is added as if there had been no break."""
        self.batches = batches
        for recorder in self.recorders:
            prefix = f"{recorder.layer}."
            own = {name.removeprefix(prefix): a for name, a in state.items() if name.startswith(prefix)}
            recorder.restore(own)

    def _check_whole(self) -> None:
        if self._failed:
            raise ShapeMoeError("A batch failed half-way, so the sums of this trace are not usable.")

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder-layer indices of the MoE layers."""
        return tuple(site.layer for site in self.sites)


def _can_choose_experts(model: PreTrainedModel) -> bool:
    if model.dtype not in GROUPED_DTYPES:
        return False
    try:
        return bool(model._grouped_mm_can_dispatch())  # noqa: SLF001  # Transformers offers no public name
    except (ValueError, ImportError):
        return False


def _hook(site: MoeSite, recorder: LayerRecorder) -> list[Any]:
    def keep_router(router: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not isinstance(output, tuple) or len(output) != 3:
            raise ShapeMoeError(
                f"Layer {recorder.layer}: the router does not return (logits, weights, ids); "
                "this version of Transformers is not supported."
            )
        if recorder.recording:
            recorder.router_logits = output[0]
            if recorder.wants_next:
                recorder.wider = wider_choice(router, recorder.moe.family.router_top_k, args, kwargs)

    return [
        *JoinWatch(site, recorder).hooks(),
        site.router.register_forward_hook(keep_router, with_kwargs=True),
    ]


def _replay(module: torch.nn.Module, args: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    hidden, ids, gates = args
    recorder = recorder_of(module)
    if recorder.recording:
        with torch.no_grad():
            run = partial(expert_outputs, module, hidden)
            recorder.add(hidden, ids, gates, run(ids), run)
