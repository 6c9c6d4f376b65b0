"""A model's ``config.json``: checked where it comes in, and completed where it leaves numbers to its class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shape_moe.architectures.families import FAMILIES, Family
from shape_moe.architectures.model_folder import CONFIG_FILE
from shape_moe.errors import CheckpointError, first_line
from shape_moe.json_file import read_json

_NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
"""Numbers that every model has; at least one."""
_OPTIONAL = (
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "max_position_embeddings",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "sliding_window",
)
_LARGEST = 2**31 - 1


def read_config(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read a model's configuration.

    Returns:
        The content of ``config.json``, completed, and what the user should know about that.

    Raises:
        CheckpointError: when it is missing, or a value is not what it should be.
    """
    config = read_json(folder / CONFIG_FILE)
    check_config(config, folder / CONFIG_FILE)
    return complete_config(config, folder / CONFIG_FILE)


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Check the values that this package reads.

    Args:
        config: the content of a ``config.json``.
        where: what it is, for the message.

    Raises:
        CheckpointError: naming the first key whose value is not what it should be.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str | None):
        raise _wrong(where, "model_type", model_type, "a text")
    for key in _NEEDED:
        if key in config and not _is_count(config[key], least=1):
            raise _wrong(where, key, config[key], "a whole number above 0")
    family = FAMILIES.get(model_type or "")
    for key in (*_OPTIONAL, *(_count_keys(family) if family else ())):
        if config.get(key) is not None and not _is_count(config[key]):
            raise _wrong(where, key, config[key], "a whole number")
    scale = family.residual_scale_key if family else None
    if scale is not None and not _is_number(config.get(scale, 1.0)):
        raise _wrong(where, scale, config[scale], "a number")
    for key, kind, word in (
        ("quantization_config", dict, "a table"),
        ("auto_map", dict, "a table"),
        ("layer_types", list, "a list"),
        ("architectures", list, "a list"),
    ):
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise _wrong(where, key, config[key], word)


def complete_config(config: dict[str, Any], where: object) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Fill in the numbers that a configuration leaves to its class in Transformers.

    Nothing is imported for a configuration that is complete.

    Returns:
        The configuration, and a sentence for each number that was filled in.

    Raises:
        CheckpointError: when the class does not have such a number, or refuses the configuration.
    """
    family = FAMILIES.get(config.get("model_type") or "")
    if family is None:
        return config, ()
    missing = [key for key in _NEEDED if key not in config]
    missing += [keys[0] for keys in (family.count_keys, family.top_k_keys) if not any(key in config for key in keys)]
    if not missing:
        return config, ()
    from transformers import AutoConfig

    try:
        full = AutoConfig.for_model(**config)
        found = {key: getattr(full, key) for key in missing}
    except Exception as error:  # a foreign class checks a foreign document as it likes
        raise CheckpointError(
            f"{where} does not say {', '.join(missing)}, and Transformers cannot complete it: {first_line(error)}"
        ) from error
    completed = {**config, **found}
    check_config(completed, where)
    name = type(full).__name__
    notes = [f"{where} does not say {key}: the default of {name}, {value}, is used." for key, value in found.items()]
    return completed, tuple(notes)


def _count_keys(family: Family) -> tuple[str, ...]:
    return (*family.count_keys, *family.top_k_keys, *(family.group_keys or ()), family.mtp_count_key)


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(where: object, key: str, value: Any, wanted: str) -> CheckpointError:
    shown = repr(value)
    return CheckpointError(f"{where}: {key} must be {wanted}, not {shown if len(shown) < 60 else shown[:57] + '...'}.")
