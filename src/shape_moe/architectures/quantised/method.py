"""Methods of quantisation, registered by name: each says what a checkpoint's tensors stand for.

A method's module knows its layout on disk and nothing else does. Other packages add methods through the entry-point
group ``shape_moe.quantisations``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shape_moe.architectures.quantised.plain import PlainTensor
from shape_moe.architectures.safetensors_file import TensorSlot
from shape_moe.errors import CheckpointError, UnsupportedModelError, first_line
from shape_moe.json_file import read_json
from shape_moe.registry import Registry

SETTINGS_KEY = "quantization_config"
Config = Mapping[str, Any]
Plain = Callable[[Mapping[str, TensorSlot]], list[PlainTensor]]


_DAMAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What settings or shapes that are not what they should be make code raise."""


@dataclass(frozen=True)
class Quantisation:
    """How one checkpoint is quantised.

    Attributes:
        label: the method and what it was told, for people: ``AWQ 4-bit, groups of 128``.
        plain: gives the tensors of the plain model from the stored ones (names and places; nothing is read).
        refusal: why values cannot be computed from what is stored, None where they can: the end of a sentence that
            begins with the label.
    """

    label: str
    plain: Plain
    refusal: str | None = None

    def tensors(self, stored: Mapping[str, TensorSlot]) -> list[PlainTensor]:
        """The tensors of the plain model.

        Raises:
            UnsupportedModelError: for a layout that is not understood.
            CheckpointError: when tensors are not what the settings say.
        """
        try:
            return self.plain(stored)
        except _DAMAGE as error:
            raise CheckpointError(
                f"{self.label}: the tensors are not laid out as the settings say ({first_line(error)}); download or "
                "copy the model again."
            ) from error


@dataclass(frozen=True)
class _Method:
    recognises: Callable[[Config], bool]
    open: Callable[[Config], Quantisation]
    file: str | None


_METHODS: Registry[_Method] = Registry(
    "quantisation method",
    "shape_moe.quantisations",
    tuple(
        f"shape_moe.architectures.quantised.{module}"
        for module in ("fp8", "mxfp4", "awq", "gptq", "compressed", "modelopt", "bnb", "mlx")
    ),
)


def register(
    name: str, *, recognises: Callable[[Config], bool] | None = None, file: str | None = None
) -> Callable[[Callable[[Config], Quantisation]], Callable[[Config], Quantisation]]:
    """Register what opens checkpoints of a method.

    Args:
        name: the method, as ``quant_method`` has it.
        recognises: whether a model's configuration is one of the method; None where ``quant_method`` says it.
        file: file beside ``config.json`` that holds the settings in checkpoints whose configuration has none.
    """

    def named(config: Config) -> bool:
        return settings_of(config).get("quant_method") == name

    def add(function: Callable[[Config], Quantisation]) -> Callable[[Config], Quantisation]:
        _METHODS.add(name, _Method(recognises or named, function, file), function)
        return function

    return add


def settings_of(config: Config) -> Config:
    """The quantisation settings of a model's configuration, empty where there are none."""
    return config.get(SETTINGS_KEY) or {}


def find_quantisation(config: Config, folder: Path | None = None) -> Quantisation | None:
    """How a model is quantised, None for one that is not.

    A method that nobody registered gives a quantisation that computes nothing and says so by the method's name.

    Args:
        config: its configuration.
        folder: where it lies; older checkpoints have their settings in a file of their own there.

    Raises:
        CheckpointError: when the settings are not what the method's should be.
    """
    for method in _METHODS.all().values():
        if method.recognises(config):
            return _opened(method, config)
    settings = settings_of(config)
    if not settings:
        return _found_beside(config, folder) if folder is not None else None
    label = str(settings.get("quant_method") or "An unnamed quantisation")
    return Quantisation(label, _stored, "is not known here; known are " + ", ".join(sorted(_METHODS.all())))


def _opened(method: _Method, config: Config) -> Quantisation:
    try:
        return method.open(config)
    except _DAMAGE as error:
        raise CheckpointError(f"The quantisation settings cannot be read: {first_line(error)}.") from error


def _found_beside(config: Config, folder: Path) -> Quantisation | None:
    for method in _METHODS.all().values():
        if method.file is not None and (folder / method.file).is_file():
            return _opened(method, {**config, SETTINGS_KEY: read_json(folder / method.file)})
    return None


def _stored(tensors: Mapping[str, TensorSlot]) -> list[PlainTensor]:
    return [PlainTensor.stored(slot) for slot in tensors.values()]


def refused(label: str, why: str) -> Quantisation:
    """A checkpoint of a known method whose layout is not understood; sizes count what is stored."""
    return Quantisation(label, _stored, why)


def check_computable(quantisation: Quantisation, name: str) -> None:
    """Refuse to compute with a checkpoint whose values cannot be computed.

    Raises:
        UnsupportedModelError: by the method's name.
    """
    if quantisation.refusal is not None:
        raise UnsupportedModelError(f"{name}: {quantisation.label} {quantisation.refusal}.")
