"""Which engines load what is written here, as data: what ``--for`` asks for, and what is said before the start."""

from __future__ import annotations

from dataclasses import dataclass

from shape_moe.errors import UsageError
from shape_moe.serving.vllm.families import VLLM_FAMILIES
from shape_moe.units import joined


@dataclass(frozen=True)
class EngineFacts:
    """What an engine loads.

    Attributes:
        label: what it calls itself.
        ragged: whether it loads a folder whose layers keep different numbers of experts, with what comes with this
            package.
        folder: whether it loads a folder as any other model's.
        gguf: whether it loads GGUF files.
        only: families whose ragged models it loads, None for all.
    """

    label: str
    ragged: bool
    folder: bool
    gguf: bool = False
    only: frozenset[str] | None = None

    def loads(self, family: str, target: str, *, gguf: bool) -> bool:
        """Whether it loads a result.

        Args:
            family: the model's family.
            target: ``ragged`` or ``stock``.
            gguf: whether the result is a GGUF file.
        """
        if gguf or not self.folder:
            return gguf and self.gguf
        return target == "stock" or (self.ragged and (self.only is None or family in self.only))


ENGINES: dict[str, EngineFacts] = {
    "vllm": EngineFacts("vLLM", ragged=True, folder=True, only=frozenset(VLLM_FAMILIES)),
    "llama.cpp": EngineFacts("llama.cpp", ragged=False, folder=False, gguf=True),
    "mlx": EngineFacts("MLX", ragged=False, folder=True),
    "sglang": EngineFacts("SGLang", ragged=False, folder=True),
    "transformers": EngineFacts("Transformers", ragged=True, folder=True),
}
"""The engines that ``--for`` knows. Whether an engine knows the family at all is not said here."""


def target_for(name: str, family: str, *, gguf: bool) -> str:
    """The target that an engine needs: ``ragged`` where it loads that, as the better one.

    Args:
        name: of the engine.
        family: the model's family.
        gguf: whether the model is a GGUF file, and so the result.

    Raises:
        UsageError: for an unknown engine, and where it does not load GGUF files.
    """
    engine = ENGINES.get(name)
    if engine is None:
        raise UsageError(f"--for takes {', '.join(ENGINES)}, not {name!r}.")
    if gguf and not engine.gguf:
        raise UsageError(
            f"A pruned GGUF file is for llama.cpp: for {engine.label} start from the model's folder, not from a file."
        )
    return "ragged" if not gguf and engine.loads(family, "ragged", gguf=False) else "stock"


def what_loads(family: str, target: str, *, gguf: bool) -> str:
    """A sentence that names the engines that will load a result, and those that will not."""
    able = [entry.label for entry in ENGINES.values() if entry.loads(family, target, gguf=gguf)]
    able += ["llama.cpp once it is converted"] if target == "stock" and not gguf else []
    unable = [name for name, entry in ENGINES.items() if not entry.loads(family, target, gguf=gguf)]
    said = f"The result will load in {joined(able)}"
    if target == "stock" or not unable:
        return f"{said}, as far as {'these know' if len(able) > 1 else 'it knows'} the family."
    labels = joined([ENGINES[name].label for name in unable], "or")
    return f"{said}, with what comes with this package, but not in {labels}; for one of those, give --for {unable[0]}."
