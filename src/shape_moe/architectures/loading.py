"""Load a full model so that its routing can be seen: on a device, in a dtype, with quantised experts unpacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.gguf_file import is_gguf
from shape_moe.architectures.gguf_tokenizer import load_gguf_tokenizer
from shape_moe.architectures.host_memory import host_memory
from shape_moe.architectures.loaded import check_loaded
from shape_moe.architectures.moe_config import foreign_code
from shape_moe.architectures.placement import is_map, placement, with_offload_folder
from shape_moe.architectures.plain_model import about_quantisation, auto_class, is_stored_plain, load_plain, plain_dtype
from shape_moe.architectures.sites import find_sites
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.errors import CheckpointError, ShapeMoeError, UnsupportedModelError, UsageError, first_line
from shape_moe.units import readable_size

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Note = Callable[[str], None]
DTYPES = ("auto", "float32", "bfloat16", "float16")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "tekken.json")
LOADING_ERRORS = (
    OSError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a damaged or foreign folder can make Transformers raise."""
_MEMORY_MARGIN = 1.15
"""Weights may take this share of the free memory at most: activations and the KV cache need the rest."""


def load_model(
    snapshot: Snapshot, *, device: str = "auto", dtype: str = "auto", note: Note = lambda _: None
) -> PreTrainedModel:
    """Load a model for tracing or masking, and make sure that all of its weights are the checkpoint's.

    Transformers' own class is used, or the code that comes with the model where the user trusts that.

    Args:
        snapshot: the model.
        device: ``auto`` (GPUs where there are some, else the CPU), ``cpu``, ``cuda``, ``cuda:1``, ..., or a device map
            (see :func:`shape_moe.architectures.placement.placement`).
        dtype: ``auto`` for the checkpoint's own.
        note: where to tell the user something that is worth a line.

    Raises:
        UnsupportedModelError: for a quantisation whose experts cannot be observed, or code that does not follow the
            experts interface.
        CheckpointError: when Transformers cannot load the model, or does not find all of its weights.
        UsageError: for an unknown device or dtype.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    places = with_offload_folder(placement(device)) if is_map(device) else placement(device)
    if not places.get("device_map") and (reason := why_not_loadable(loaded_bytes(snapshot, dtype), "cpu")):
        raise ShapeMoeError(f"{snapshot.name} does not fit into memory: {reason}.")
    code = foreign_code(snapshot.config)
    model, info = _from_pretrained(snapshot, dtype, places, trusted=code is not None and snapshot.trust_remote_code)
    left = check_loaded(snapshot, model, info)
    for line in (*snapshot.notes, about_quantisation(snapshot, dtype), _about_code(code, model), left):
        if line is not None:
            note(line)
    return model.eval()


def _from_pretrained(
    snapshot: Snapshot, dtype: str, options: dict[str, Any], *, trusted: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model as Transformers loads it, and its loading info."""
    import torch

    options = {**options, "trust_remote_code": trusted}
    try:
        with quietly():
            if not is_stored_plain(snapshot):
                return load_plain(snapshot, dtype, options)
            # tensors of another shape are refused below, with all others that are not as they should be
            found: tuple[PreTrainedModel, dict[str, Any]] = auto_class(snapshot).from_pretrained(
                snapshot.path,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                **options,
            )
    except torch.OutOfMemoryError:
        raise
    except LOADING_ERRORS as error:
        raise CheckpointError(f"Transformers could not load {snapshot.name}: {first_line(error)}") from error
    return found


def _about_code(code: str | None, model: PreTrainedModel) -> str | None:
    """What is said of code that comes with the model; foreign code that cannot be traced is refused."""
    if code is None:
        return None
    kind = type(model)
    if kind.__module__.startswith("transformers."):
        return f"The model names code of its own ({code}); Transformers' own {kind.__name__} is used instead."
    try:
        find_sites(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"The code that comes with the model ({code}) cannot be traced: {error} Without --trust-remote-code "
            "Transformers' own class is used."
        ) from error
    return f"The code that comes with the model is used ({code})."


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        path: its folder, or a GGUF file that has one in its metadata.
        trust_remote_code: run the code that comes with the tokenizer, where there is some.

    Raises:
        CheckpointError: when there is none that Transformers can load.
    """
    if is_gguf(path):
        return load_gguf_tokenizer(path)
    from transformers import AutoTokenizer

    if not any(True for pattern in _VOCABULARIES for _ in path.glob(pattern)):
        # Transformers would make an empty tokenizer of the model's family
        raise CheckpointError(f"{path} has no tokenizer: copy the original's tokenizer files there.")
    others = [pattern for pattern in _VOCABULARIES if pattern != "tokenizer.model" and any(path.glob(pattern))]
    if not others and find_spec("sentencepiece") is None:
        raise CheckpointError(
            f"{path} has its tokenizer as tokenizer.model alone, which takes two more packages to read: pip install "
            "sentencepiece protobuf. Or copy the original's tokenizer.json there."
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{path} has no tokenizer that can be loaded: {first_line(error)}") from error
    return tokenizer


def find_tokenizer(snapshot: Snapshot) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model, None where there is none that can be loaded."""
    try:
        return load_tokenizer(snapshot.path, trust_remote_code=snapshot.trust_remote_code)
    except (CheckpointError, UnsupportedModelError):
        return None


@contextmanager
def quietly() -> Iterator[None]:
    """Keep Transformers' own bars and reports off: callers show progress, and say what is wrong, in their own way."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many token ids the model embeds; a model with a vision part says so of its text part."""
    return int(model.config.get_text_config().vocab_size)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: with the embeddings, or to the CPU where those are offloaded."""
    import torch

    device: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def loaded_bytes(snapshot: Snapshot, dtype: str = "auto") -> int:
    """Bytes that the weights take once loaded, quantised ones dequantised."""
    bits = {"float32": 32, "bfloat16": 16, "float16": 16}
    computed = bits.get(plain_dtype(snapshot, dtype), 16)  # another dtype is refused where the model is loaded
    return sum(
        tensor.count * (bits.get(dtype) or max(tensor.stored_bits or computed, 16)) // 8
        for tensor in snapshot.plain_or_stored
    )


def release_memory() -> None:
    """Give back what models that nobody holds any more have taken, also what torch keeps of a GPU for later."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_memory(device: str = "auto") -> int:
    """Bytes free on the device (all GPUs together under ``auto``, those and the machine's with a device map)."""
    import torch

    placement(device)
    if is_map(device):
        gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        return host_memory() + sum(torch.cuda.mem_get_info(index)[0] for index in gpus)
    if device == "cpu" or not torch.cuda.is_available():
        return host_memory()
    chosen = range(torch.cuda.device_count()) if device in ("auto", "cuda") else [torch.device(device).index or 0]
    return sum(torch.cuda.mem_get_info(index)[0] for index in chosen)


def why_not_loadable(bytes_needed: int, device: str = "auto") -> str | None:
    """A sentence that says why a model of this size cannot be loaded, None when it can, and where a map places it."""
    if is_map(device):
        return None
    free = free_memory(device)
    if bytes_needed * _MEMORY_MARGIN <= free:
        return None
    return f"the model needs {readable_size(bytes_needed)} and {readable_size(free)} are free"
