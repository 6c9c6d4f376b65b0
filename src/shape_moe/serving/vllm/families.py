"""Where vLLM keeps the model code of each family: facts as data, no code."""

from __future__ import annotations

from dataclasses import dataclass

from shape_moe.architectures.families import FAMILIES


@dataclass(frozen=True)
class VllmFamily:
    """Facts about one family in vLLM.

    Attributes:
        module: module under ``vllm.model_executor.models``.
        block: class of the MoE block in that module. It builds the router, and then the experts by calling the
            module's ``FusedMoEFactory``.
        counts_packed_rows: whether the loader shapes packed tensors by the configuration's number of experts.
    """

    module: str
    block: str
    counts_packed_rows: bool = False


VLLM_FAMILIES: dict[str, VllmFamily] = {
    "qwen3_moe": VllmFamily("qwen3_moe", "Qwen3MoeSparseMoeBlock"),
    "qwen2_moe": VllmFamily("qwen2_moe", "Qwen2MoeSparseMoeBlock"),
    "olmoe": VllmFamily("olmoe", "OlmoeMoE"),
    "mixtral": VllmFamily("mixtral", "MixtralMoE"),
    "gpt_oss": VllmFamily("gpt_oss", "MLPBlock", counts_packed_rows=True),
    "deepseek_v2": VllmFamily("deepseek_v2", "DeepseekV2MoE"),
    "deepseek_v3": VllmFamily("deepseek_v2", "DeepseekV2MoE"),
    "glm4_moe": VllmFamily("glm4_moe", "Glm4MoE"),
}


def architectures() -> dict[str, str]:
    """The family (model type) of every architecture that the plugin serves, by the name in ``config.json``."""
    from shape_moe.pruning.modeling_shape_moe import PREFIX  # with it come torch and transformers

    return {PREFIX + FAMILIES[name].stock_class: name for name in VLLM_FAMILIES}
