"""Load a full model so that its routing can be seen: on a device, in a dtype, with quantised experts unpacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.loaded import check_loaded
from shape_moe.architectures.moe_config import foreign_code
from shape_moe.architectures.quantised.plain import PlainTensor
from shape_moe.architectures.sites import find_sites
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.errors import CheckpointError, ShapeMoeError, UnsupportedModelError, UsageError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Note = Callable[[str], None]
DTYPES = ("auto", "float32", "bfloat16", "float16")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "tekken.json")
_LOADING_ERRORS = (
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
        device: ``auto`` (GPUs where there are some, else the CPU), ``cpu``, ``cuda``, ``cuda:1``, ...
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
    placement = _placement(device)
    if not placement.get("device_map") and (reason := why_not_loadable(loaded_bytes(snapshot, dtype), "cpu")):
        raise ShapeMoeError(f"{snapshot.name} does not fit into memory: {reason}.")
    code = foreign_code(snapshot.config)
    model, info = _from_pretrained(snapshot, dtype, placement, trusted=code is not None and snapshot.trust_remote_code)
    left = check_loaded(snapshot, model, info)
    for line in (*snapshot.notes, _about_quantisation(snapshot, dtype), _about_code(code, model), left):
        if line is not None:
            note(line)
    return model.eval()


def _from_pretrained(
    snapshot: Snapshot, dtype: str, options: dict[str, Any], *, trusted: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model as Transformers loads it, and its loading info."""
    import torch
    from transformers import AutoModelForCausalLM

    options = {**options, "trust_remote_code": trusted}
    try:
        with _quietly():
            if snapshot.quantisation is not None or snapshot.path.is_file():
                return _from_plain(snapshot, getattr(torch, loaded_dtype(snapshot, dtype)), options)
            # tensors of another shape are refused below, with all others that are not as they should be
            found: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
                snapshot.path,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                **options,
            )
    except torch.OutOfMemoryError:
        raise
    except _LOADING_ERRORS as error:
        raise CheckpointError(f"Transformers could not load {snapshot.name}: {first_line(error)}") from error
    return found


def _from_plain(
    snapshot: Snapshot, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The plain model of what Transformers does not read: its tensors are computed one by one as Transformers asks."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trusted = options.pop("trust_remote_code")
    if snapshot.path.is_dir():
        config = AutoConfig.from_pretrained(snapshot.path, trust_remote_code=trusted)
    else:
        config = _made_config(snapshot)
    for key in ("quantization_config", "quantization"):
        if hasattr(config, key):
            delattr(config, key)
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trusted))
    failures: list[ShapeMoeError] = []
    tensors = {name: _Lazy(tensor, failures) for name, tensor in snapshot.plain.items()}
    try:
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=dtype,
            **options,
        )
    except _LOADING_ERRORS:
        if failures:
            raise failures[0] from None
        raise
    if failures:
        raise failures[0]
    model.name_or_path = str(snapshot.path)
    return model, info


def _made_config(snapshot: Snapshot) -> Any:
    """The configuration of a model of which there is no folder.

    Raises:
        CheckpointError: when the model's class refuses it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**snapshot.config)
    except Exception as error:  # a class checks a foreign document as it likes
        name = snapshot.name
        raise CheckpointError(f"Transformers refuses the configuration of {name}: {first_line(error)}") from error


class _Lazy:
    """A tensor that Transformers asks for its values when it loads them, as it asks a slice of a file.

    Args:
        tensor: the tensor.
        failures: where an error goes: Transformers would report it as a missing weight.
    """

    def __init__(self, tensor: PlainTensor, failures: list[ShapeMoeError]) -> None:
        self._tensor, self._failures = tensor, failures

    def __getitem__(self, index: Any) -> torch.Tensor:
        try:
            return self._tensor.values()[index]
        except ShapeMoeError as error:
            self._failures.append(error)
            raise


def _about_quantisation(snapshot: Snapshot, dtype: str) -> str | None:
    """What is said of a model that is not run as it is stored."""
    if snapshot.quantisation is None:
        return None
    return f"{snapshot.quantisation.label}: dequantised to {loaded_dtype(snapshot, dtype)} to be run here."


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
    """Load the tokenizer of a model folder.

    Args:
        path: the folder.
        trust_remote_code: run the code that comes with the tokenizer, where there is some.

    Raises:
        CheckpointError: when there is none that Transformers can load.
    """
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
    except _LOADING_ERRORS as error:
        raise CheckpointError(f"{path} has no tokenizer that can be loaded: {first_line(error)}") from error
    return tokenizer


def find_tokenizer(snapshot: Snapshot) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model, None where there is none that can be loaded."""
    try:
        return load_tokenizer(snapshot.path, trust_remote_code=snapshot.trust_remote_code)
    except CheckpointError:
        return None


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


def loaded_dtype(snapshot: Snapshot, dtype: str = "auto") -> str:
    """In which dtype a quantised model is loaded: the one that is asked for, else its configuration's."""
    if dtype != "auto":
        return dtype
    named = snapshot.config.get("dtype") or snapshot.config.get("torch_dtype")
    return named if named in DTYPES else "bfloat16"


def _placement(device: str) -> dict[str, Any]:
    import torch

    if device == "auto":
        return {"device_map": "auto"} if torch.cuda.is_available() else {}
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"There is no device {device!r}; use auto, cpu, cuda or cuda:N.") from error
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UsageError(f"Device {device} was asked for, but torch sees {torch.cuda.device_count()} GPUs.")
    return {} if kind == "cpu" else {"device_map": {"": device}}


@contextmanager
def _quietly() -> Iterator[None]:
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


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: with the embeddings, or to the CPU where those are offloaded."""
    import torch

    device: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def loaded_bytes(snapshot: Snapshot, dtype: str = "auto") -> int:
    """Bytes that the weights take once loaded, quantised ones dequantised."""
    bits = {"float32": 32, "bfloat16": 16, "float16": 16}
    computed = bits[loaded_dtype(snapshot, dtype)]
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
    """Bytes free on the device (all GPUs together under ``auto``)."""
    import psutil
    import torch

    _placement(device)
    if device == "cpu" or not torch.cuda.is_available():
        return int(psutil.virtual_memory().available)
    chosen = range(torch.cuda.device_count()) if device in ("auto", "cuda") else [torch.device(device).index or 0]
    return sum(torch.cuda.mem_get_info(index)[0] for index in chosen)


def why_not_loadable(bytes_needed: int, device: str = "auto") -> str | None:
    """A sentence that says why a model of this size cannot be loaded, None when it can."""
    free = free_memory(device)
    if bytes_needed * _MEMORY_MARGIN <= free:
        return None
    return f"the model needs {bytes_needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
