"""The MoE layers of a live Transformers model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from packaging.version import Version

from shape_moe.architectures.families import Family
from shape_moe.architectures.moe_config import MoeConfig, read_moe_config
from shape_moe.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class MoeSite:
    """One MoE layer of a live model.

    Attributes:
        layer: decoder-layer index.
        block: the MoE block.
        router: the router inside the block; its forward gives (logits, weights, ids).
        experts: the experts module inside the block; its forward takes (hidden, ids, weights).
        residual_norm: the norm whose input is the residual stream that feeds the block.
        decoder_layer: the layer itself; its output is the residual stream after the block.
        after: norms that the experts' output passes before it joins the stream, in order.
        beside: modules whose output joins the block's.
        parallel: modules whose output joins the stream before the block's does.
        latent: the projections before and after the experts, where those work in a space of their own.
    """

    layer: int
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    residual_norm: nn.Module
    decoder_layer: nn.Module
    after: tuple[nn.Module, ...] = ()
    beside: tuple[nn.Module, ...] = ()
    parallel: tuple[nn.Module, ...] = ()
    latent: tuple[nn.Module, ...] = ()


def live_moe_config(model: PreTrainedModel) -> MoeConfig:
    """Facts about the routed experts of a live model."""
    return read_moe_config(model.config.to_dict())


def find_sites(model: PreTrainedModel) -> list[MoeSite]:
    """Find the MoE layers of a model, in layer order.

    Raises:
        UnsupportedModelError: when the family is unknown, when fused kernels replaced a block, or when an experts
            module does not follow the uniform interface that tracing and masking rely on.
    """
    moe = live_moe_config(model)
    family = moe.family
    _check_transformers(family)
    if getattr(model, "use_kernels", False) or getattr(model, "_use_kernels", False):
        raise UnsupportedModelError(
            "The model was loaded with use_kernels=True, whose fused blocks bypass the experts interface; "
            "load it with use_kernels=False."
        )
    sites = []
    for name, layer in model.named_modules():
        match = re.search(r"(?:^|\.)layers\.(\d+)$", name)
        block = _child(layer, family.block) if match else None
        experts = _child(block, family.experts) if block is not None else None
        if match is None or block is None or experts is None:
            continue
        _check_experts(experts, f"{name}.{family.inside_block(family.experts)}")
        sites.append(_site(int(match[1]), name, layer, block, experts, family))
    if not sites:
        raise UnsupportedModelError(f"No MoE layer was found in {type(model).__name__}: the model is dense.")
    return sorted(sites, key=lambda site: site.layer)


def decoder_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The decoder layers of a model with MoE layers, dense ones included, by index."""
    site = find_sites(model)[0]
    found = [(name, layer) for name, layer in model.named_modules() if re.search(r"(?:^|\.)layers\.\d+$", name)]
    (prefix,) = {name.rpartition(".")[0] for name, layer in found if any(m is site.block for m in layer.modules())}
    own = [(name, layer) for name, layer in found if name.rpartition(".")[0] == prefix]
    return {int(name.rpartition(".")[2]): layer for name, layer in own}


def _site(number: int, name: str, layer: nn.Module, block: nn.Module, experts: nn.Module, family: Family) -> MoeSite:
    def part(path: str) -> nn.Module:
        found = _child(layer, path)
        if found is None:
            raise UnsupportedModelError(f"{name} has no module {path}: the facts about {family.model_type} are off.")
        return found

    optional = (_child(layer, path) for path in family.beside)
    return MoeSite(
        layer=number,
        block=block,
        router=part(family.inside_block(family.router)),
        experts=experts,
        residual_norm=part(family.residual_norm),
        decoder_layer=layer,
        after=tuple(part(path) for path in family.after),
        beside=tuple(module for module in optional if module is not None),
        parallel=tuple(part(path) for path in family.parallel),
        latent=tuple(part(family.inside_block(path)) for path in family.latent or ()),
    )


def _check_transformers(family: Family) -> None:
    found = version("transformers")
    if family.transformers is not None and Version(found) < Version(family.transformers):
        raise UnsupportedModelError(
            f"{family.model_type} needs Transformers {family.transformers} or newer, whose router gives its results in "
            f"the order that all families use; this is {found}."
        )


def _child(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _check_experts(experts: nn.Module, name: str) -> None:
    kind = type(experts).__name__
    if kind.startswith("Mxfp4"):
        raise UnsupportedModelError(
            f"{name} runs fused MXFP4 kernels that bypass the experts interface; load the model with "
            "quantization_config=Mxfp4Config(dequantize=True)."
        )
    if kind.startswith("FP8"):
        raise UnsupportedModelError(
            f"{name} runs block-FP8 kernels that bypass the experts interface; load the model with "
            "quantization_config=FineGrainedFP8Config(dequantize=True)."
        )
    if not hasattr(experts, "is_transposed"):
        raise UnsupportedModelError(
            f"{name} ({kind}) does not use Transformers' experts interface (@use_experts_implementation); "
            "its routing cannot be observed. Use a newer Transformers or another family."
        )
