"""The decoder layers of a model in memory, one at a time: any stream of hidden states through any of them.

What a layer is called with beside hidden states (masks, positions) is made by the model's own forward pass, which runs
around it with all other layers passing their input on; so a layer does what it does in the whole model, bit for bit.
:class:`shape_moe.architectures.layered_model.LayeredModel` does the same with layers that are read from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.loading import input_device
from shape_moe.architectures.sites import decoder_layers, live_moe_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class LiveLayers:
    """Runs single decoder layers of a model; use it inside :meth:`attached`.

    Args:
        model: the model, in memory.

    Attributes:
        num_layers: its decoder layers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._decoder: Any = model.get_decoder()
        self._layers = decoder_layers(model)
        self.num_layers = len(self._layers)
        self._current: int | None = None
        self._entering: torch.Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[LiveLayers]:
        """Take the layers apart; the model is given back as it was."""
        training = [module for module in self.model.modules() if module.training]
        with ExitStack() as stack:
            stack.callback(_set_training, training)
            self.model.eval()
            for index, layer in self._layers.items():
                _replace(stack, layer, self._forward_of(index, layer.forward))
            final = self._decoder.get_submodule(live_moe_config(self.model).family.final_norm)
            _replace(stack, final, lambda hidden: hidden)
            yield self

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        """Have the input embeddings in memory, where they are anyway."""
        yield

    def layers(self, start: int = 0, stop: int | None = None) -> Iterator[int]:
        """Take each decoder layer in turn.

        Args:
            start: the first.
            stop: the one behind the last, None for the model's last.

        Yields:
            The index of the layer that :meth:`advance` runs.
        """
        for index in range(start, self.num_layers if stop is None else stop):
            self._current = index
            try:
                yield index
            finally:
                self._current = None

    def enter(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """What the first decoder layer receives [B, T, H] for tokens [B, T]."""
        device = input_device(self.model)
        return self._run(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))

    def advance(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, H] after the layer whose turn it is, where it computes.

        Args:
            hidden: what it receives.
            attention_mask: int64 [B, T], 1 on tokens.
        """
        assert self._current is not None
        device = input_device(self.model)
        self._entering = hidden.to(device)
        try:
            return self._run(inputs_embeds=self._entering, attention_mask=attention_mask.to(device))
        finally:
            self._entering = None

    def _run(self, **inputs: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.no_grad():
            output: torch.Tensor = self._decoder(use_cache=False, **inputs).last_hidden_state
        return output

    def _forward_of(self, index: int, real: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's forward that computes in its turn, and else passes its input on."""

        def forward(hidden: torch.Tensor, *arguments: Any, **more: Any) -> torch.Tensor:
            if index != self._current:
                return hidden
            # families scale what they embed, so the layer's input is not what the decoder was given
            output: torch.Tensor = real(self._entering, *arguments, **more)
            return output

        return forward


def _replace(stack: ExitStack, module: torch.nn.Module, forward: Callable[..., Any]) -> None:
    """Give a module another forward until the stack unwinds."""
    own = module.__dict__.get("forward")
    stack.callback(_put_back, module, own)
    module.forward = forward


def _put_back(module: torch.nn.Module, forward: Any) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _set_training(modules: list[torch.nn.Module]) -> None:
    for module in modules:
        module.training = True
