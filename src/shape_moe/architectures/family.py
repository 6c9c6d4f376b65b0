"""What can be known about a model family: the facts that all other code reads, and no family by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """Facts about one model family.

    Attributes:
        model_type: ``config.json``'s ``model_type``.
        stock_class: class of the causal language model in Transformers.
        count_keys: config keys that may hold the number of routed experts; those present are read and written.
        top_k_keys: config keys that may hold the number of experts per token.
        block: path of the MoE block inside a decoder layer of the live model.
        router: path of the router inside the block of the live model.
        experts: path of the experts module inside the block of the live model.
        router_top_k: attribute of the live router that says how many experts it chooses.
        disk_block: path of the MoE block inside a decoder layer on disk.
        disk_router: path of the router inside the block on disk.
        router_rows: router tensors on disk with one row per expert, relative to the block on disk; in the original
            layout and in that of the live model, which ``save_pretrained(save_original_format=False)`` writes.
        projections: an expert's gate, up and down projections on disk, None where they are packed.
        packed: tensors on disk that hold all experts of a layer outside of ``experts``, relative to the block; the down
            projections last.
        residual_norm: norm in the decoder layer whose input is the residual stream that feeds the block.
        residual_scale_key: config key of the factor on the block's output, None where there is none.
        router_scores: how router logits become probabilities; ``other`` where they depend on those chosen before.
        renormalises: config key (or a constant) that says whether gate weights sum to one over the top-k.
        group_keys: config keys of the number of router groups and of the groups a token may use; None without.
        group_minimum: experts that a group must keep for the router's group score to be defined.
        transformers: oldest version of Transformers whose router and experts have the interface, where that is newer
            than the oldest that this package takes.
        has_mtp_layers: whether checkpoints may carry multi-token-prediction layers: after the decoder layers, or under
            a name of their own (``mtp.``).
        mtp_count_keys: config keys that may count those layers.
        vision: beginnings of the names of tensors on disk that belong to vision parts, which text does not use.
        layers: paths of the decoder layers on disk, in the layouts that there are.
        listed_keys: config keys that may give a number once for every layer, where it is the same in all.
        layer_list: config key of a list with one entry per decoder layer, where no number counts them.
        config_part: the part of ``config.json`` that describes the language model, None where it is the whole.
        auto_class: the auto class of Transformers that knows the model.
        final_norm: the decoder's last norm, inside the live decoder.
        router_columns: those of ``router_rows`` with one column per expert instead.
        router_whole: tensors inside the live router that have no row per expert, whatever their shape.
        block_rows: tensors of the live block itself with one row per expert; the block passes them to its router.
        routed_scale: factor on the experts' output inside the block: a config key.
        latent: the projections inside the live block before and after the experts, where those work in a space of
            their own.
        after: norms in the live decoder layer that the experts' output passes before it joins the residual stream, in
            order; with each, the token's own factor is held fixed.
        beside: modules in the live decoder layer whose output joins the block's.
        parallel: modules in the live decoder layer whose output joins the residual stream before the block's does.
        stream_is_normed: whether the norm's output, not its input, is what the block's output is added to.
        stream_scale_key: config key of the factor on the residual stream in that sum.
        sum_scale: tensor of the live decoder layer that multiplies the sum, None where there is none.
        not_layered: why the model cannot be run one layer at a time, None where it can.
        untraceable: why experts of this family can be cut, but have no statistics; None where they have.
        unrouted: why pruned experts cannot leave the router; None where they can.
    """

    model_type: str
    stock_class: str
    count_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    top_k_keys: tuple[str, ...] = ("num_experts_per_tok",)
    block: str = "mlp"
    router: str = "gate"
    experts: str = "experts"
    router_top_k: str = "top_k"
    disk_block: str = "mlp"
    disk_router: str = "gate"
    router_rows: tuple[str, ...] = ("gate.weight",)
    projections: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")
    packed: tuple[str, ...] = ()
    residual_norm: str = "post_attention_layernorm"
    residual_scale_key: str | None = None
    router_scores: Literal["softmax", "sigmoid", "other"] = "softmax"
    renormalises: str | bool = "norm_topk_prob"
    group_keys: tuple[str, str] | None = None
    group_minimum: int = 1
    transformers: str | None = None
    has_mtp_layers: bool = False
    mtp_count_keys: tuple[str, ...] = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
    vision: tuple[str, ...] = ()
    layers: tuple[str, ...] = ("model.layers",)
    listed_keys: tuple[str, ...] = ()
    layer_list: str | None = None
    config_part: str | None = None
    auto_class: str = "AutoModelForCausalLM"
    final_norm: str = "norm"
    router_columns: tuple[str, ...] = ()
    router_whole: tuple[str, ...] = ()
    block_rows: tuple[str, ...] = ()
    routed_scale: str | None = None
    latent: tuple[str, str] | None = None
    after: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    parallel: tuple[str, ...] = ()
    stream_is_normed: bool = False
    stream_scale_key: str | None = None
    sum_scale: str | None = None
    not_layered: str | None = None
    untraceable: str | None = None
    unrouted: str | None = None

    @property
    def why_no_refit(self) -> str | None:
        """Why down projections cannot be solved again by least squares in the residual stream, None where they can."""
        if self.after:
            return "a norm follows its experts, so that its layers are not linear in the down projections"
        if self.latent is not None:
            return "its experts work in a space of their own, not in that of the residual stream"
        return self.not_layered

    def inside_block(self, path: str) -> str:
        """The path of a part of the block inside a decoder layer of the live model."""
        return joined(self.block, path)

    def language_part(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of a model's ``config.json`` that describes the language model."""
        part = config.get(self.config_part) if self.config_part is not None else config
        return part if isinstance(part, Mapping) else {}


def joined(*paths: str) -> str:
    """One path of modules; empty ones name the module itself."""
    return ".".join(path for path in paths if path)
