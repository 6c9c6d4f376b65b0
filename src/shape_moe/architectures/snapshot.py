"""A model on disk, seen through its configuration and tensor headers; no weight is read to open one."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shape_moe.architectures.config_file import read_config
from shape_moe.architectures.gguf_file import is_gguf
from shape_moe.architectures.model_folder import (
    CONFIG_FILE,
    INDEX_FILE,
    QUANTISATION_FILES,
    SINGLE_FILE,
    check_model_folder,
    no_weights,
)
from shape_moe.architectures.moe_config import MoeConfig, read_moe_config
from shape_moe.architectures.quantised.method import Quantisation, check_computable, find_quantisation
from shape_moe.architectures.quantised.plain import PlainTensor, with_the_rest
from shape_moe.architectures.safetensors_file import TensorSlot, read_header, stored_values
from shape_moe.architectures.tensor_names import TensorRole, is_router_part, tensor_role
from shape_moe.architectures.weight_source import Form
from shape_moe.embedded_model import EMBEDDED, embedded_model_path
from shape_moe.errors import CheckpointError, UnsupportedModelError, UsageError, first_line
from shape_moe.json_file import read_json

if TYPE_CHECKING:
    import torch

Part = TypeVar("Part", TensorSlot, PlainTensor)
"""A tensor as it is stored, or as the plain model has it."""

ROOT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USAGE_POLICY*",
)
"""Files of a model besides its weights and configuration that loaders, servers and lawyers need."""


@dataclass(frozen=True)
class Snapshot:
    """A model folder.

    Attributes:
        path: the folder.
        config: the content of ``config.json``.
        tensors: every tensor by name, shard by shard in file order.
        name: what the user asked for: a hub id or the folder.
        revision: the commit of a hub model, None for a local folder.
        notes: what the user should know about how it was read.
        trust_remote_code: whether the user allows code that comes with the model to be run.
        hashes: fingerprints that were computed once.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorSlot]
    name: str
    revision: str | None = None
    notes: tuple[str, ...] = ()
    trust_remote_code: bool = False
    _roles: dict[str, TensorRole] = field(default_factory=dict, repr=False, compare=False)
    hashes: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def moe(self) -> MoeConfig:
        """Facts about the routed experts (raises for models that cannot be pruned)."""
        return read_moe_config(self.config)

    def role(self, name: str) -> TensorRole:
        """What a tensor is to the pruner; layers past the last decoder layer count as ``other``."""
        if name not in self._roles:
            role = tensor_role(self.moe.family, name)
            if role.layer >= self.moe.num_layers:
                role = TensorRole("other", role.layer)
            self._roles[name] = role
        return self._roles[name]

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Decoder layers with routed experts, ascending, as their tensors show them.

        Raises:
            UnsupportedModelError: when the tensors do not match the family's facts.
        """
        experts: dict[int, set[int]] = defaultdict(set)
        for name, slot in self.tensors.items():
            role = self.role(name)
            if role.role == "expert":
                experts[role.layer].add(role.expert)
            elif role.role in ("packed", "router"):
                if slot.shape[role.dimension : role.dimension + 1] != (self.moe.num_experts,):
                    which = ("first", "second")[role.dimension]
                    raise UnsupportedModelError(
                        f"Tensor {name} has shape {slot.shape}, but its {which} dimension should be the "
                        f"{self.moe.num_experts} experts: this layout is not understood."
                    )
                if role.role == "packed":
                    experts[role.layer] |= set(range(self.moe.num_experts))
            elif is_router_part(self.moe.family, name) and role.layer < self.moe.num_layers:
                raise UnsupportedModelError(
                    f"Router tensor {name} is not known for {self.moe.family.model_type}; a quantised router "
                    "cannot be pruned: use a checkpoint whose routers are not quantised."
                )
        wanted = set(range(self.moe.num_experts))
        broken = [layer for layer, found in experts.items() if found != wanted]
        if broken or not experts:
            where = f"layer {broken[0]} has {len(experts[broken[0]])}" if broken else "no layer has any"
            raise CheckpointError(
                f"{self.path}: the configuration promises {len(wanted)} experts, {where} on disk; "
                "the download is incomplete or the family's facts do not fit."
            )
        return tuple(sorted(experts))

    def files(self) -> Iterator[tuple[Path, list[TensorSlot]]]:
        """The shards in order, each with its tensors by offset."""
        by_file: dict[Path, list[TensorSlot]] = defaultdict(list)
        for slot in self.tensors.values():
            by_file[slot.file].append(slot)
        for file in sorted(by_file):
            yield file, sorted(by_file[file], key=lambda slot: slot.start)

    def read(self, name: str) -> bytes:
        """The raw bytes of one tensor."""
        return self.tensors[name].read()

    def layer(self, layer: int) -> tuple[TensorSlot, ...]:
        """All tensors of one decoder layer."""
        return tuple(slot for name, slot in self.tensors.items() if self.role(name).layer == layer)

    def expert(self, layer: int, expert: int) -> tuple[TensorSlot, ...]:
        """The tensors of one expert: its own, and its rows of those that hold all experts of the layer."""
        return self._of_expert(self.layer(layer), expert)

    def _of_expert(self, tensors: Iterable[Part], expert: int) -> tuple[Part, ...]:
        """Of a layer's tensors those of one expert, and its rows of those that hold all."""
        parts = []
        for tensor in tensors:
            role = self.role(tensor.name)
            if role.role == "packed":
                parts.append(tensor.row(expert))
            elif role.role == "expert" and role.expert == expert:
                parts.append(tensor)
        return tuple(parts)

    def values(self, slot: TensorSlot, form: Form = "raw") -> torch.Tensor:
        """The values of a stored tensor, or of a row of one, in the dtype in which they are stored.

        Raises:
            UnsupportedModelError: for dequantised values of what is only a part of a tensor of the plain model.
        """
        if form == "dequantised" and self.quantisation is not None:
            plain = self.plain.get(slot.name)
            if plain is None or plain.is_quantised:
                raise UnsupportedModelError(f"{self.name}: {slot.name} is only a part of a quantised tensor.")
        return stored_values(slot)

    @cached_property
    def quantisation(self) -> Quantisation | None:
        """How the weights are quantised, None where they are not."""
        return find_quantisation(self.config, self.path)

    @property
    def forms(self) -> frozenset[Form]:
        """The forms in which values are given."""
        known = self.quantisation is None or self.quantisation.refusal is None
        return frozenset(("raw", "dequantised") if known else ("raw",))

    @cached_property
    def plain(self) -> dict[str, PlainTensor]:
        """The tensors of the plain model by name.

        Raises:
            UnsupportedModelError: by the method's name, for weights that cannot be dequantised.
        """
        tensors = self.plain_or_stored
        if self.quantisation is not None:
            check_computable(self.quantisation, self.name)
            tensors = self.quantisation.tensors(self.tensors)
        return {tensor.name: tensor for tensor in tensors}

    @cached_property
    def plain_or_stored(self) -> list[PlainTensor]:
        """The tensors of the plain model, to count them; the stored ones where those cannot be told."""
        if self.quantisation is None:
            return with_the_rest(self.tensors, ())
        try:
            return self.quantisation.tensors(self.tensors)
        except UnsupportedModelError:
            return with_the_rest(self.tensors, ())

    @cached_property
    def _plain_by_layer(self) -> dict[int, tuple[PlainTensor, ...]]:
        layers: dict[int, list[PlainTensor]] = defaultdict(list)
        for name, tensor in self.plain.items():
            layers[self.role(name).layer].append(tensor)
        return {layer: tuple(tensors) for layer, tensors in layers.items()}

    def plain_layer(self, layer: int) -> tuple[PlainTensor, ...]:
        """All tensors of one decoder layer of the plain model."""
        return self._plain_by_layer.get(layer, ())

    def plain_expert(self, layer: int, expert: int) -> tuple[PlainTensor, ...]:
        """The tensors of one expert of the plain model: its own, and its rows of those that hold all of the layer."""
        return self._of_expert(self.plain_layer(layer), expert)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(slot.size for slot in self.tensors.values())


def exists(path: Path) -> bool:
    """Whether something is there; a name that no file can have names nothing."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a path: none on the hub begins as this one does."""
    return name.startswith((".", "/", "~"))


def open_snapshot(
    model: str | os.PathLike[str], revision: str | None = None, *, trust_remote_code: bool = False
) -> Snapshot:
    """Open a local model folder or GGUF file, or the local copy of a hub model (downloaded when it is missing).

    Args:
        model: a folder, a GGUF file (any part of a split one), a hub id, or ``embedded`` for the model that ships
            with this package.
        revision: of a hub model.
        trust_remote_code: run the code that comes with the model, where there is some, instead of Transformers' own.

    Raises:
        CheckpointError: when there is no such model, or a file is missing or damaged.
        UsageError: for a revision of a folder, and for an object that is no name.
    """
    path = _place(model, revision)
    commit = None
    if not exists(path):
        path, commit = _download(str(model), revision)
    if is_gguf(path):
        from shape_moe.architectures.gguf_model import open_gguf  # a snapshot itself

        return open_gguf(path, str(model))
    check_model_folder(path)
    config, notes = read_config(path)
    return Snapshot(path, config, _read_tensors(path), str(model), commit, notes, trust_remote_code)


def open_headers(model: str | os.PathLike[str], revision: str | None = None) -> Snapshot:
    """Open a model to look at its configuration and tensor headers; of a hub model nothing else is downloaded.

    The tensors of a hub model that is not on this machine cannot be read from the result.

    Raises:
        CheckpointError: when there is no such model, or its headers are damaged.
        UsageError: for a revision of a folder, and for an object that is no name.
    """
    if exists(_place(model, revision)) or looks_like_path(str(model)):
        return open_snapshot(model, revision)
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, NotASafetensorsRepoError, OfflineModeIsEnabled

    try:
        metadata = get_safetensors_metadata(str(model), revision=revision)
        config, notes = read_config(Path(hf_hub_download(str(model), CONFIG_FILE, revision=revision)).parent)
    except (OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError):
        return open_snapshot(model, revision)  # a local copy may be there; if not, it says why
    except NotASafetensorsRepoError as error:
        raise CheckpointError(f"{model} has no safetensors files: only safetensors are read.") from error
    tensors = {}
    for file, content in metadata.files_metadata.items():
        for name, info in content.tensors.items():
            begin, end = info.data_offsets
            tensors[name] = TensorSlot(name, info.dtype, tuple(info.shape), Path(file), begin, end - begin)
    return Snapshot(Path(str(model)), config, tensors, str(model), revision, notes)


def check_named(model: object) -> None:
    """Check that a model is named, not given as an object.

    Raises:
        UsageError: saying what can be done with an object.
    """
    if not isinstance(model, str | os.PathLike):
        raise UsageError(
            f"A model is named by its folder or its name on the hub, not by a {type(model).__name__}: save it first "
            "(save_pretrained, for the tokenizer too) and name the folder. A loaded model can be traced "
            "(shape_moe.trace), masked (shape_moe.masked) and cut down in memory (shape_moe.prune_model)."
        )


def _place(model: str | os.PathLike[str], revision: str | None) -> Path:
    """Where a model lies, if it is a folder or the embedded one; its name on the hub otherwise."""
    check_named(model)
    path = Path(model)
    if str(model) == EMBEDDED and not exists(path):
        path = embedded_model_path()
    if revision is not None and exists(path):
        raise UsageError(f"{model} is a folder on this machine, which has no revisions: leave the revision out.")
    return path


def _download(model: str, revision: str | None) -> tuple[Path, str | None]:
    if looks_like_path(model) or model.count("/") > 1:
        raise CheckpointError(f"There is no model folder {model}.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [CONFIG_FILE, "*.safetensors", INDEX_FILE, *QUANTISATION_FILES, *ROOT_FILES]
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except HFValidationError as error:
        raise CheckpointError(f"{model!r} is neither a model folder nor a valid hub id.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        message = f"There is no folder {model}, and the hub could not provide it: {first_line(error)}"
        raise CheckpointError(message) from error
    return folder, folder.name if folder.parent.name == "snapshots" else None


def _read_tensors(path: Path) -> dict[str, TensorSlot]:
    index_file, single = path / INDEX_FILE, path / SINGLE_FILE
    if index_file.is_file() or index_file.is_symlink():
        tensors = _read_indexed(path, read_json(index_file))
        if single.is_file() and any(slot.file != single for slot in tensors.values()):
            raise CheckpointError(
                f"{path} holds both {SINGLE_FILE} and {INDEX_FILE} of other files, and loaders choose differently: "
                "remove the one that is not the model."
            )
        return tensors
    if single.is_file() or single.is_symlink():
        return read_header(single)[0]
    raise no_weights(path)


def _read_indexed(path: Path, index: dict[str, Any]) -> dict[str, TensorSlot]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path / INDEX_FILE} has no weight_map.")
    tensors: dict[str, TensorSlot] = {}
    for shard in sorted({_shard_name(path, shard) for shard in weight_map.values()}):
        slots, _ = read_header(path / shard)
        tensors.update({name: slot for name, slot in slots.items() if weight_map.get(name) == shard})
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} tensors of the index are in no shard, the first is {missing[0]}; "
            "download or copy the model again."
        )
    return tensors


def _shard_name(path: Path, shard: Any) -> str:
    if not isinstance(shard, str) or not shard.isprintable() or len(shard.encode(errors="replace")) > 255:
        shown = repr(shard)
        raise CheckpointError(f"{path / INDEX_FILE} names {shown[:60]}, which is not a file name.")
    if Path(shard).name != shard:
        raise CheckpointError(f"{path / INDEX_FILE} points outside the model folder: {shard!r}.")
    return shard
