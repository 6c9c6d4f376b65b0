"""What a path holds that is not a model folder of safetensors: named for what it is, with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from shape_moe.errors import CheckpointError
from shape_moe.json_file import read_json

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_config.json"
QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files beside ``config.json`` that servers read quantisation settings from: modelopt, GPTQ, AWQ."""
_NAME_IT = "name the file itself, the first where the model is split into several."
_BIN = (
    "only safetensors are read. Convert the model once: load it with Transformers' from_pretrained, and write it with "
    "save_pretrained."
)


def check_model_folder(path: Path) -> None:
    """Refuse a path that exists but is not a model folder.

    Raises:
        CheckpointError: for a file, a LoRA adapter, GGUF files, or a folder without ``config.json``.
    """
    if path.is_file():
        _refuse_file(path)
    adapter, config = path / ADAPTER_FILE, path / CONFIG_FILE
    if adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path") or "its base model"
        if config.is_file():
            raise CheckpointError(
                f"{path} holds a LoRA adapter of {base} beside a model, which Transformers would load too: merge it "
                f"into the model, or remove {ADAPTER_FILE}."
            )
        raise CheckpointError(
            f"{path} is a LoRA adapter of {base}, not a model: merge it into that model first (merge_and_unload of "
            "peft), save the result, and name that folder."
        )
    if config.is_file() or config.is_symlink():
        return
    if ggufs := _names(path, "*.gguf"):
        raise CheckpointError(f"{path} holds GGUF files ({_some(ggufs)}): {_NAME_IT}")
    if (path / "snapshots").is_dir():
        raise CheckpointError(
            f"{path} is a folder of the hub's cache, not a model: name the hub id, or the folder under "
            f"{path / 'snapshots'} that holds {CONFIG_FILE}."
        )
    inside = sorted(child.name for child in path.iterdir() if (child / CONFIG_FILE).is_file())
    hint = f" (it is in {_some(inside)})" if inside else f" (found {_some(found)})" if (found := _names(path)) else ""
    raise CheckpointError(f"{path} is not a model folder: {CONFIG_FILE} is missing{hint}.")


def no_weights(path: Path) -> CheckpointError:
    """The error that says what a model folder without safetensors holds instead."""
    pickles = [*_names(path, "*.bin"), *_names(path, "*.pth"), *_names(path, "*.pt")]
    if others := _names(path, "*.safetensors"):
        return CheckpointError(
            f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE} (found {_some(others)}): download or copy the model "
            "again, the index included."
        )
    if pickles:
        return CheckpointError(f"{path} holds its weights as PyTorch pickles (found {_some(pickles)}): {_BIN}")
    if ggufs := _names(path, "*.gguf"):
        return CheckpointError(f"{path} holds GGUF files ({_some(ggufs)}): {_NAME_IT}")
    return CheckpointError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}: it holds no weights.")


def _refuse_file(path: Path) -> NoReturn:
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path} is named like a GGUF file but is not one: download or copy it again.")
    raise CheckpointError(f"{path} is a file: name the folder that holds the model ({CONFIG_FILE} and its weights).")


def _names(path: Path, pattern: str = "*") -> list[str]:
    return sorted(file.name for file in path.glob(pattern) if file.is_file())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
