"""The plain model of weights that Transformers does not read as they are: quantised ones, and those of GGUF files.

Transformers builds the model of its configuration and takes the tensors one by one, each computed when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shape_moe.architectures.families import FAMILIES
from shape_moe.architectures.quantised.plain import PlainTensor
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.errors import CheckpointError, ShapeMoeError, UnsupportedModelError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_DTYPES = ("float32", "bfloat16", "float16")
_QUANTISATION_KEYS = ("quantization_config", "quantization")


def is_stored_plain(snapshot: Snapshot) -> bool:
    """Whether Transformers reads the model as it is stored."""
    return snapshot.quantisation is None and not snapshot.path.is_file()


def about_quantisation(snapshot: Snapshot, dtype: str) -> str | None:
    """What is said of a model that is not run as it is stored."""
    if snapshot.quantisation is None:
        return None
    return f"{snapshot.quantisation.label}: dequantised to {plain_dtype(snapshot, dtype)} to be run here."


def check_observable(snapshot: Snapshot) -> None:
    """Refuse a model whose experts cannot be observed, before any weight is read.

    Raises:
        UnsupportedModelError: for a quantisation that cannot be dequantised, by its name.
    """
    if (reason := why_not_observable(snapshot)) is not None:
        raise UnsupportedModelError(
            f"{reason[0].upper()}{reason[1:]}. Trace the unquantised model of the same routers instead (shape-moe "
            "trace), and prune this one by that trace (shape-moe prune --trace)."
        )


def why_not_observable(snapshot: Snapshot) -> str | None:
    """Why the routing of a model cannot be observed in Transformers although its family is known, None if it can."""
    if snapshot.quantisation is None:
        return None
    try:
        _ = snapshot.plain
    except UnsupportedModelError as error:
        return str(error).removesuffix(".")
    return None


def plain_dtype(snapshot: Snapshot, dtype: str = "auto") -> str:
    """In which dtype the plain model runs: the one that is asked for, else its configuration's."""
    if dtype != "auto":
        return dtype
    named = snapshot.config.get("dtype") or snapshot.config.get("torch_dtype")
    return named if named in _DTYPES else "bfloat16"


def plain_config(snapshot: Snapshot, *, trusted: bool = False) -> Any:
    """The configuration of the plain model, as Transformers has it.

    Args:
        snapshot: the model on disk.
        trusted: run the code that comes with the configuration, where there is some.

    Raises:
        CheckpointError: when the model's class refuses it.
    """
    from transformers import AutoConfig

    if snapshot.path.is_dir():
        config = AutoConfig.from_pretrained(snapshot.path, trust_remote_code=trusted)
    else:
        try:
            config = AutoConfig.for_model(**snapshot.config)
        except Exception as error:  # a class checks a foreign document as it likes
            name = snapshot.name
            raise CheckpointError(f"Transformers refuses the configuration of {name}: {first_line(error)}") from error
    for key in _QUANTISATION_KEYS:
        if hasattr(config, key):
            delattr(config, key)
    return config


def auto_class(snapshot: Snapshot) -> Any:
    """The auto class of Transformers that knows a model."""
    import transformers

    family = FAMILIES.get(snapshot.config.get("model_type") or "")
    return getattr(transformers, family.auto_class if family else "AutoModelForCausalLM")


def load_plain(snapshot: Snapshot, dtype: str, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The plain model and Transformers' loading info.

    Args:
        snapshot: the model on disk.
        dtype: in which dtype, ``auto`` for its configuration's.
        options: further arguments of ``from_pretrained``; ``trust_remote_code`` is one.

    Raises:
        UnsupportedModelError: by the method's name, for weights that cannot be dequantised.
        CheckpointError: naming a tensor whose parts cannot be read or do not fit each other.
    """
    import torch

    trusted = bool(options["trust_remote_code"])
    more = {key: value for key, value in options.items() if key != "trust_remote_code"}
    config, failures = plain_config(snapshot, trusted=trusted), list[ShapeMoeError]()
    tensors = {name: _Lazy(tensor, failures) for name, tensor in snapshot.plain.items()}
    with torch.device("meta"):
        kind = type(auto_class(snapshot).from_config(config, trust_remote_code=trusted))
    try:
        found: tuple[PreTrainedModel, dict[str, Any]] = kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=getattr(torch, plain_dtype(snapshot, dtype)),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **more,
        )
    finally:
        if failures:  # Transformers reports them in its own way, or as missing weights
            raise failures[0] from None
    found[0].name_or_path = str(snapshot.path)
    return found


class _Lazy:
    """A tensor that Transformers asks for its values when it loads them, as it asks a slice of a file.

    Args:
        tensor: the tensor.
        failures: where an error goes.
    """

    def __init__(self, tensor: PlainTensor, failures: list[ShapeMoeError]) -> None:
        self._tensor, self._failures = tensor, failures

    def __getitem__(self, index: Any) -> torch.Tensor:
        try:
            return self._tensor.values()[index]
        except ShapeMoeError as error:
            self._failures.append(error)
            raise
