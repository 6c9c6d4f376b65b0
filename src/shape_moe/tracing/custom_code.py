"""Whether code that comes with a model can be traced: its logits must not change while it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shape_moe.architectures.loading import input_device, vocabulary_size
from shape_moe.calibration.batches import make_batch
from shape_moe.calibration.examples import Example
from shape_moe.errors import ShapeMoeError, UnsupportedModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 24


def check_traceable(model: PreTrainedModel) -> None:
    """Trace a few tokens and compare the logits, bit by bit, with those of an untraced run.

    Raises:
        UnsupportedModelError: when they differ, or the tokens cannot be traced.
    """
    import torch

    from shape_moe.tracing.transformers_model import ModelTracer

    kind = type(model).__name__
    tracer = ModelTracer(model)
    tokens = tuple(number % vocabulary_size(model) for number in range(3, 3 + 7 * _TOKENS, 7))
    batch = make_batch([Example(0, "a probe", tokens)], [0], 0)
    before = model.config._experts_implementation  # noqa: SLF001  # no public name
    try:
        model.set_experts_implementation(tracer.implementation)
        with torch.no_grad():
            ids, mask = (part.to(input_device(model)) for part in (batch.input_ids, batch.attention_mask))
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        with tracer.attached():
            found = tracer.add(batch)
    except (ShapeMoeError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        message = f"The code that comes with the model ({kind}) cannot be traced: {first_line(error)}"
        raise UnsupportedModelError(message) from error
    finally:
        model.set_experts_implementation(before)
    if not torch.equal(found, expected):
        raise UnsupportedModelError(
            f"The code that comes with the model ({kind}) gives other logits while it is traced, so that its trace "
            "would not describe it. Without --trust-remote-code Transformers' own class is used."
        )
