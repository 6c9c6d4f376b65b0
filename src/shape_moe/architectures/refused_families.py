"""Families with routed experts that cannot be pruned, each with the reason: said instead of "unknown"."""

from __future__ import annotations

_NO_INTERFACE = "its experts do not use Transformers' experts interface, so that what each of them gives cannot be seen"
_SEVERAL_STREAMS = (
    "it keeps several residual streams (hyper-connections), and what a block adds to them is not one vector"
)

REFUSED: dict[str, str] = {
    "dbrx": _NO_INTERFACE,
    "doge": _NO_INTERFACE,
    "flex_olmo": "no norm stands before its experts, so that the residual stream that feeds them is not known",
    "inkling2": "its router scores the shared expert among the routed ones",
    "jetmoe": "its attention has experts too, and they do not use Transformers' experts interface",
    "kolibri1": "the bias that its routers choose by lies outside of the blocks",
    "llama4": "its router's scores multiply what the experts receive, and one expert serves a token",
    "longcat_flash": "some of its experts are empty, and the router counts them",
    "nllb_moe": _NO_INTERFACE,
    "qwen4_exp": _SEVERAL_STREAMS,
    "qwen4_exp_text": _SEVERAL_STREAMS,
    "step3p7": _NO_INTERFACE,
    "switch_transformers": _NO_INTERFACE,
    "zaya": "its router is a network of its own with one class more than there are experts",
}
