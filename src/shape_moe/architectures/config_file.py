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


def with_text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with what it says of its text part, which models that also see keep in a part of its own."""
    return {**(config.get("text_config") or {}), **config}


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
    family = FAMILIES.get(model_type or "")
    part: Mapping[str, Any] = config
    if family is not None and family.config_part is not None:
        if not isinstance(config.get(family.config_part), Mapping):
            raise _wrong(where, family.config_part, config.get(family.config_part), "a table")
        part = family.language_part(config)
    _check_numbers(part, family, where)
    for key, kind, word in (
        ("quantization_config", dict, "a table"),
        ("auto_map", dict, "a table"),
        ("layer_types", list, "a list"),
        ("architectures", list, "a list"),
    ):
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise _wrong(where, key, config[key], word)


def _check_numbers(part: Mapping[str, Any], family: Family | None, where: object) -> None:
    for key in _NEEDED:
        if key in part and not _is_count(part[key], least=1):
            raise _wrong(where, key, part[key], "a whole number above 0")
    for key in (*_OPTIONAL, *(_count_keys(family) if family else ())):
        listed = family is not None and key in family.listed_keys
        value = _same_everywhere(part.get(key)) if listed else part.get(key)
        if value is not None and not _is_count(value):
            raise _wrong(where, key, part[key], "a whole number")
    for scale in (family.residual_scale_key, family.routed_scale, family.stream_scale_key) if family else ():
        if scale is not None and not (_is_number(part.get(scale, 1.0)) or part[scale] in ("sum", "average")):
            raise _wrong(where, scale, part[scale], "a number")


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
    part = family.language_part(config)
    listed = isinstance(part.get(family.layer_list or ""), list)
    missing = [key for key in _NEEDED if key not in part and not (listed and key == "num_hidden_layers")]
    lacking = [keys for keys in (family.count_keys, family.top_k_keys) if not any(key in part for key in keys)]
    if not missing and not lacking:
        return config, ()
    from transformers import AutoConfig

    try:
        full = AutoConfig.for_model(**config).get_text_config()
        missing += [next((key for key in keys if hasattr(full, key)), keys[0]) for keys in lacking]
        found = {key: getattr(full, key) for key in missing}
    except Exception as error:  # a foreign class checks a foreign document as it likes
        names = ", ".join([*missing, *(keys[0] for keys in lacking if keys[0] not in missing)])
        raise CheckpointError(
            f"{where} does not say {names}, and Transformers cannot complete it: {first_line(error)}"
        ) from error
    completed = {**config, **found}
    if family.config_part is not None:
        completed = {**config, family.config_part: {**part, **found}}
    check_config(completed, where)
    name = type(full).__name__
    notes = [f"{where} does not say {key}: the default of {name}, {value}, is used." for key, value in found.items()]
    return completed, tuple(notes)


def _count_keys(family: Family) -> tuple[str, ...]:
    return (*family.count_keys, *family.top_k_keys, *(family.group_keys or ()), *family.mtp_count_keys)


def _same_everywhere(value: Any) -> Any:
    """A number that is given for every layer, where it is the same in all of them."""
    return value[0] if isinstance(value, list) and value and all(other == value[0] for other in value) else value


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(where: object, key: str, value: Any, wanted: str) -> CheckpointError:
    shown = repr(value)
    return CheckpointError(f"{where}: {key} must be {wanted}, not {shown if len(shown) < 60 else shown[:57] + '...'}.")
