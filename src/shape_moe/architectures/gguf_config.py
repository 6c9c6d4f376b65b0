"""The configuration of a model, as Transformers would have it, from what a GGUF file says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shape_moe.architectures.config_file import check_config
from shape_moe.architectures.gguf_architectures import ARCHITECTURES, GgufArchitecture
from shape_moe.architectures.gguf_file import GgufTensor
from shape_moe.errors import CheckpointError, UnsupportedModelError, first_line

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_ONE_SIZE = ("mixtral", "olmoe", "gpt_oss")
"""Families whose only feed-forward size is that of an expert."""
_SIGMOID = 2
"""Number of the gating function whose scores are sigmoids."""
_MSCALE = 0.1
"""YaRN's factor on the logarithm; the metadata hold its product with ``mscale_all_dim``."""


def find_architecture(metadata: Mapping[str, Any], where: object) -> GgufArchitecture:
    """The facts about the architecture that a file names.

    Raises:
        CheckpointError: when it names none.
        UnsupportedModelError: for one that is not known, or a model without experts.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise CheckpointError(f"{where} does not say its architecture (general.architecture): is it a model?")
    if not metadata.get(f"{name}.expert_count"):
        raise UnsupportedModelError(f"{where} ({name}) has no experts: there is nothing to prune.")
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{where} has the architecture {name!r}; GGUF files of {', '.join(sorted(ARCHITECTURES))} are supported."
        )
    return ARCHITECTURES[name]


def gguf_config(metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor], where: object) -> dict[str, Any]:
    """The configuration of a model.

    Args:
        metadata: of the file, by key.
        tensors: of the file, by name.
        where: what it is, for messages.

    Raises:
        CheckpointError: when the metadata lack what every model says.
        UnsupportedModelError: for an architecture that is not known, or what Transformers does not have of it.
    """
    known = find_architecture(metadata, where)
    try:
        config = _config(metadata, tensors, known, where)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(
            f"{where}: a value of the metadata is of another kind than it should be: {first_line(error)}"
        ) from error
    check_config(config, where)
    return config


def _config(
    metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor], known: GgufArchitecture, where: object
) -> dict[str, Any]:
    own = _Own(metadata, known.name, where)
    config: dict[str, Any] = {"model_type": known.family, **known.constants}
    for key, name in known.keys.items():
        value = own.get(key)
        if value is not None:
            config[name] = value
    nextn = own.get("nextn_predict_layers") or 0
    config["num_hidden_layers"] = _layers(own, tensors) - nextn
    if nextn:
        config["num_nextn_predict_layers"] = nextn
    config["vocab_size"] = _rows(tensors, "token_embd.weight", where)
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["dtype"] = _dtype(tensors)
    for key, name in _TOKENS.items():
        config[name] = metadata.get(f"tokenizer.ggml.{key}")
    config["rope_parameters"] = _rotary(own)
    _sizes(config, known, tensors, where)
    if known.default_top_groups:
        config.setdefault("n_group", 1)
        config.setdefault("topk_group", 1)
    if known.family == "gpt_oss":
        config["layer_types"] = _alternating(config["num_hidden_layers"])
        config["rope_parameters"].setdefault("truncate", False)
    if known.family == "glm4_moe":
        _glm(config, own, tensors)
    if known.family == "deepseek_v2":
        _deepseek(config, own, tensors)
    return config


class _Own:
    """The entries that belong to the architecture."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str, where: object) -> None:
        self.metadata, self.prefix, self.where = metadata, prefix, where

    def get(self, key: str) -> Any:
        """A value, None where there is none; of one value for every layer, the one that they all have."""
        value = self.metadata.get(f"{self.prefix}.{key}")
        if not isinstance(value, list):
            return value
        different = sorted(set(value) - {0})
        if len(different) > 1:
            raise UnsupportedModelError(
                f"{self.where}: {self.prefix}.{key} differs between layers ({different}), which Transformers' class "
                "cannot have."
            )
        return different[0] if different else None

    def need(self, key: str) -> Any:
        """A whole number that must be there."""
        value = self.get(key)
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{self.where}: {self.prefix}.{key} is {value!r}, not a whole number above 0.")
        return value


def _layers(own: _Own, tensors: Mapping[str, GgufTensor]) -> int:
    """The number of layers, those for multi-token prediction included."""
    found = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if own.need("block_count") != len(found):
        raise CheckpointError(
            f"{own.where} promises {own.need('block_count')} layers and has tensors of {len(found)}: it is no whole "
            "model; where it is one of several parts, name the first."
        )
    return len(found)


def _rows(tensors: Mapping[str, GgufTensor], name: str, where: object) -> int:
    if name not in tensors or len(tensors[name].shape) != 2:
        raise CheckpointError(f"{where} has no tensor {name}: it is not a whole model.")
    return tensors[name].shape[0]


def _dtype(tensors: Mapping[str, GgufTensor]) -> str:
    """The dtype in which the model is computed: that of its largest matrices, bfloat16 where those are quantised."""
    bytes_of: dict[str, int] = {}
    for tensor in tensors.values():
        if len(tensor.shape) > 1:
            bytes_of[tensor.type_name] = bytes_of.get(tensor.type_name, 0) + tensor.size
    largest = max(bytes_of, key=lambda name: bytes_of[name], default="F32")
    return _DTYPES.get(largest, "bfloat16")


def _rotary(own: _Own) -> dict[str, Any]:
    """The parameters of rotary embeddings.

    Raises:
        UnsupportedModelError: for a kind of scaling that is not understood.
    """
    kind = own.get("rope.scaling.type")
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": own.get("rope.freq_base") or 10000.0}
    if kind in (None, "none"):
        return found
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(f"{own.where}: rotary embeddings scaled by {kind!r} are not understood.")
    found |= {"rope_type": kind, "factor": own.get("rope.scaling.factor") or 1.0}
    if kind == "yarn":
        found["original_max_position_embeddings"] = own.get("rope.scaling.original_context_length")
        found["beta_fast"] = own.get("rope.scaling.yarn_beta_fast") or 32.0
        found["beta_slow"] = own.get("rope.scaling.yarn_beta_slow") or 1.0
        if multiplier := own.get("rope.scaling.yarn_log_multiplier"):
            found["mscale"] = found["mscale_all_dim"] = multiplier / _MSCALE
    return found


def _sizes(config: dict[str, Any], known: GgufArchitecture, tensors: Mapping[str, GgufTensor], where: object) -> None:
    """Sizes that tensors show, and layers without experts."""
    layers = range(config["num_hidden_layers"])
    sparse = [layer for layer in layers if f"blk.{layer}.ffn_gate_inp.weight" in tensors]
    if not sparse:
        raise CheckpointError(f"{where} counts experts, and no layer has a router: it is not a whole model.")
    if known.dense_layers_key is not None:
        config[known.dense_layers_key] = [layer for layer in layers if layer not in sparse]
    expert = tensors.get(f"blk.{sparse[0]}.ffn_down_exps.weight")
    if expert is None or len(expert.shape) != 3:
        raise UnsupportedModelError(
            f"{where} does not hold all experts of a layer in one tensor, as files do since 2024: convert the model "
            "again with a current llama.cpp."
        )
    config["intermediate_size" if known.family in _ONE_SIZE else "moe_intermediate_size"] = expert.shape[2]
    shared = tensors.get(f"blk.{sparse[0]}.ffn_down_shexp.weight")
    if known.family == "qwen2_moe" and shared is not None:
        config["shared_expert_intermediate_size"] = shared.shape[1]


def _alternating(layers: int) -> list[str]:
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]


def _glm(config: dict[str, Any], own: _Own, tensors: Mapping[str, GgufTensor]) -> None:
    config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    turned = own.get("rope.dimension_count")
    if turned and config.get("head_dim"):
        config["rope_parameters"]["partial_rotary_factor"] = turned / config["head_dim"]


def _deepseek(config: dict[str, Any], own: _Own, tensors: Mapping[str, GgufTensor]) -> None:
    """DeepSeek-V2 and V3 share an architecture there; heads are those before compression."""
    config["num_key_value_heads"] = config["num_attention_heads"]
    config.setdefault("q_lora_rank", None)
    key = own.get("attention.key_length_mla") or own.need("attention.key_length")
    config["v_head_dim"] = own.get("attention.value_length_mla") or own.need("attention.value_length")
    config["qk_nope_head_dim"] = key - config["qk_rope_head_dim"]
    config.setdefault("norm_topk_prob", False)
    corrected = any(name.endswith(".exp_probs_b.bias") for name in tensors)
    if own.get("expert_gating_func") == _SIGMOID or corrected:
        config["model_type"] = "deepseek_v3"
    else:
        config["topk_method"] = "group_limited_greedy" if config["n_group"] > 1 else "greedy"
