"""Where a block's output joins the residual stream: what is added to what, and the proof that it is so.

By definition ``h`` is what the block's output is added to, as it enters that sum, and ``y`` is what is added. Most
families add the block's output itself to the input of the norm before it. Others scale one of them, project the
experts' output up, take it through norms, or add the attention's output in the same sum: their facts name those places.
Once per layer the sum is compared with what the decoder layer really gave, so that wrong facts are errors and never
numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from shape_moe.calibration.batches import PADDING
from shape_moe.errors import ShapeMoeError

if TYPE_CHECKING:
    from shape_moe.architectures.sites import MoeSite
    from shape_moe.tracing.recorder import LayerRecorder

_ROUNDINGS = 16
"""How many roundings of the largest part of a sum its result may be off."""


class JoinWatch:
    """Watches one layer from the norm before its block to its output, and gives the recorder ``h`` and ``y``.

    Args:
        site: the layer.
        recorder: what records it.
    """

    def __init__(self, site: MoeSite, recorder: LayerRecorder) -> None:
        self.site, self.recorder, self.moe = site, recorder, recorder.moe
        self._checked = False
        self._forget()
        recorder.waits = bool(site.after or site.parallel or site.latent)

    def _forget(self) -> None:
        self._norms: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._others: dict[int, torch.Tensor] = {}
        self._stream: torch.Tensor | None = None
        self._joining: torch.Tensor | None = None
        self._block: torch.Tensor | None = None

    def hooks(self) -> list[Any]:
        """Install what watches."""
        site = self.site
        handles = [site.residual_norm.register_forward_hook(self._normed)]
        if site.latent:
            handles.append(site.latent[0].register_forward_hook(self._projected))
        for place, norm in enumerate(site.after):
            handles.append(norm.register_forward_hook(self._keep_norm(place)))
        handles += [m.register_forward_hook(self._keep_other) for m in (*site.beside, *site.parallel)]
        if site.block is not site.decoder_layer:
            handles.append(site.block.register_forward_hook(self._keep_block))
        handles.append(site.decoder_layer.register_forward_hook(self._left))
        return handles

    def _normed(self, _module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self._forget()
        stream = output if self.moe.family.stream_is_normed else args[0]
        self._stream = self.recorder.residual = stream if self.moe.stream_scale == 1 else stream * self.moe.stream_scale
        self.recorder.normed = output

    def _projected(self, _module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        normed = self.recorder.normed
        if normed is not None and torch.equal(args[0].reshape(normed.shape), normed):
            self.recorder.normed = output

    def _keep_norm(self, place: int) -> Callable[..., None]:
        def keep(_module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            self._norms[place] = (args[0], output)
            self._joining = output

        return keep

    def _keep_other(self, module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._others[id(module)] = _first(output)

    def _keep_block(self, _module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._joining = self._block = _first(output)

    def _left(self, _module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """The layer is done: what was seen of the experts is recorded, and the sum proved."""
        recorder = self.recorder
        if not recorder.recording or not recorder.calls or self._stream is None:
            return
        h = self._stream
        for module in self.site.parallel:
            h = h + self._others.get(id(module), 0)
        if not self._checked:
            self._check(h, _first(output))
        if recorder.waits:
            recorder.settle(h, self._joined)
        self._forget()

    def _joined(self, outputs: torch.Tensor) -> torch.Tensor:
        """Experts' outputs [T, k, *] as they reach the stream [T, k, H], apart from constant factors."""
        if self.site.latent:
            outputs = self._raised(outputs)
        for place, norm in enumerate(self.site.after):
            before, after = self._norms[place]
            outputs = outputs * self._factor(norm, before, after).unsqueeze(1).to(outputs)
        return outputs

    def _raised(self, outputs: torch.Tensor) -> torch.Tensor:
        weight: Any = getattr(self.site.latent[1], "weight", None)  # without a space of their own it is the identity
        return outputs if weight is None else outputs @ weight.to(outputs.dtype).T

    def _factor(self, norm: torch.nn.Module, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """What a norm multiplied every token by [T, H]: its weights times the token's own factor.

        Raises:
            ShapeMoeError: for a norm that does more than multiply.
        """
        x, found = before.flatten(0, -2).double(), after.flatten(0, -2).double()
        ones = torch.ones(1, x.shape[-1], dtype=before.dtype, device=before.device)
        weights = norm.forward(ones * 2**10).double()  # so large that what is added to the mean square does not count
        along = x * weights
        size = along.square().sum(-1, keepdim=True)
        token = torch.where(size > 0, (along * found).sum(-1, keepdim=True) / size, 0)
        self._compare("its norm after the experts", token * along, found, found.abs() + (token * along).abs())
        factors: torch.Tensor = token * weights
        return factors

    def _check(self, h: torch.Tensor, stream: torch.Tensor) -> None:
        if not bool(torch.isfinite(stream).all()):
            return  # said of the experts, or of the batch, where it shows
        joining = self._joining
        if joining is None or stream.numel() != h.numel():
            raise self._wrong("the decoder layer gives something else than a residual stream")
        h, joining = h.reshape(stream.shape), joining.reshape(stream.shape)
        added = joining + sum(self._others.get(id(module), 0) for module in self.site.beside)
        total = h.double() + self.moe.block_scale * added.double()
        if self.moe.family.sum_scale is not None:
            total = total * getattr(self.site.decoder_layer, self.moe.family.sum_scale).double()
        self._compare("the residual stream", total, stream, h.abs() + added.abs() + stream.abs())
        self._checked = True

    def _compare(self, what: str, expected: torch.Tensor, found: torch.Tensor, size: torch.Tensor) -> None:
        """Tokens are compared as vectors, padding left aside; sizes are those of what was rounded."""
        context = self.recorder.context
        assert context is not None
        real = (context.kinds != PADDING).to(found.device)
        error = (expected.double() - found.double()).flatten(0, -2)[real].norm(dim=-1)
        assert self._stream is not None
        allowed = _ROUNDINGS * torch.finfo(self._stream.dtype).eps
        if not bool((error <= allowed * size.double().flatten(0, -2)[real].norm(dim=-1)).all()):
            raise self._wrong(f"{what} is not what the family's facts say")

    def _wrong(self, why: str) -> ShapeMoeError:
        return ShapeMoeError(
            f"Layer {self.recorder.layer}: {why}; the family's facts do not fit this model, and what its experts add "
            "to the residual stream is not known."
        )


def _first(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found
