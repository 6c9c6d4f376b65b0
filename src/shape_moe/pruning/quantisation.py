"""Expert numbers in quantisation settings: every place that can name an expert names it by its new number.

Quantisers name modules in many ways: lists of module names, names as keys of per-layer settings, globs, regular
expressions. A rule that names one expert by its full name is renumbered, or removed with its expert. A pattern that
hits all experts of a layer alike stays as it is. A pattern that tells experts apart would hit other experts after
pruning; it is refused by name.
"""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shape_moe.architectures.families import Family
from shape_moe.errors import UnsupportedModelError

QUANTISATION_KEY = "quantization_config"

_PATTERN_KEYS = frozenset(
    {
        "block_name_to_quantize",
        "dynamic",
        "exclude",
        "exclude_layers",
        "exclude_modules",
        "extra_config",
        "ignore",
        "ignored_layers",
        "include",
        "layer_config",
        "layer_quant_config",
        "llm_int8_skip_modules",
        "modules_in_block_to_quantize",
        "modules_to_convert",
        "modules_to_not_convert",
        "quant_config",
        "quantized_layers",
        "skip_modules",
        "targets",
        "to_quant_block_names",
    }
)
"""Keys whose texts (in lists, or as keys of a table) name modules; elsewhere only texts that speak of experts do."""

_PROJECTIONS = ("", ".gate_proj", ".up_proj", ".down_proj", ".w1", ".w2", ".w3", ".gate_up_proj")
_PREFIXES = ("model.", "")
_PLAIN = re.compile(r"[\w.\-/ ]*")
_PREFIXED = re.compile(r"(re|\+|-):", re.DOTALL)
_NUMBERED = re.compile(r"experts?[^A-Za-z]*\d")
_ALIKE = re.compile(r"(?:\.\*|\\\.|[A-Za-z_^$()|])*")
"""Regular expressions of letters and ``.*`` alone: they cannot tell numbers apart."""


@dataclass(frozen=True)
class Numbering:
    """Old and new numbers of the experts of a model.

    Attributes:
        family: facts about the family.
        total: experts per layer before pruning.
        kept: kept ids by decoder-layer index, ascending; the new number of an expert is its place among them.
    """

    family: Family
    total: int
    kept: Mapping[int, Sequence[int]]

    @cached_property
    def pruned(self) -> tuple[int, ...]:
        """The layers that lose experts."""
        return tuple(layer for layer, ids in self.kept.items() if len(ids) < self.total)

    def of(self, layer: int, expert: int) -> int | None:
        """The new number of an expert, None for one that is gone."""
        ids = self.kept.get(layer)
        if ids is None:
            return expert
        return ids.index(expert) if expert in ids else None

    @cached_property
    def names(self) -> dict[tuple[int, str, str], list[str]]:
        """Names that loaders may give the experts' modules, by expert, for every pruned layer and spelling."""
        blocks = dict.fromkeys((self.family.disk_block, self.family.block))
        return {
            (layer, f"{prefix}{block}", projection): [
                f"{prefix}layers.{layer}.{block}.experts.{expert}{projection}" for expert in range(self.total)
            ]
            for layer in self.pruned
            for prefix in _PREFIXES
            for block in blocks
            for projection in _PROJECTIONS
        }


def renumber_quantisation(section: Any, numbering: Numbering, where: str) -> Any:
    """Rewrite quantisation settings for a pruned model.

    Args:
        section: the settings: a JSON value; not changed.
        numbering: old and new numbers of the experts.
        where: what holds the settings, for messages.

    Returns:
        The settings with every expert under its new number.

    Raises:
        UnsupportedModelError: naming a pattern that tells experts apart, and the key that holds it.
    """
    return _Rewriter(numbering, where).value(section, (), names=False)


def check_quantisation(section: Any, family: Family, total: int, layers: Sequence[int], where: str) -> None:
    """Find out whether quantisation settings can be rewritten, whatever is going to be kept.

    Raises:
        UnsupportedModelError: naming a pattern that tells experts apart, and the key that holds it.
    """
    renumber_quantisation(section, Numbering(family, total, {layer: range(1, total) for layer in layers}), where)


@dataclass(frozen=True)
class _Rewriter:
    numbering: Numbering
    where: str

    def value(self, value: Any, path: tuple[str, ...], *, names: bool) -> Any:
        """A value with its texts rewritten; ``names`` says that texts of a list here name modules."""
        if isinstance(value, Mapping):
            return self._table(value, path, names=names)
        if isinstance(value, list):
            return self._list(value, path, names=names)
        if isinstance(value, str) and (names or _speaks_of_experts(value)):
            return self._text(value, path)
        return value

    def _table(self, table: Mapping[str, Any], path: tuple[str, ...], *, names: bool) -> dict[str, Any]:
        self._check_layerless([key for key in table if _layerless(key) is not None], path)
        result = {}
        for key, value in table.items():
            new = self._text(key, path) if names or _speaks_of_experts(key) else key
            if new is None:
                continue
            inner = self.value(value, (*path, key), names=key in _PATTERN_KEYS)
            if inner is not None or value is None:
                result[new] = inner
        return result

    def _list(self, items: list[Any], path: tuple[str, ...], *, names: bool) -> list[Any]:
        self._check_layerless([item for item in items if isinstance(item, str) and _layerless(item)], path)
        results = [(item, self.value(item, path, names=names)) for item in items]
        return [new for item, new in results if new is not None or item is None]

    def _text(self, text: str, path: tuple[str, ...]) -> str | None:
        """One name or pattern, rewritten; None for one whose expert is gone."""
        if (found := _named_expert(text)) is not None:
            parts, place, layer = found
            new = self.numbering.of(layer, int(parts[place]))
            if new is None:
                return None
            return ".".join([*parts[:place], str(new), *parts[place + 1 :]])
        if (found_layerless := _layerless(text)) is not None:  # all experts are named so: see _check_layerless
            most = max((len(ids) for ids in self.numbering.kept.values()), default=self.numbering.total)
            return text if found_layerless[1] < most else None
        if not self._alike(text):
            raise self._refusal(text, path)
        return text

    def _check_layerless(self, texts: Sequence[str], path: tuple[str, ...]) -> None:
        """Names of experts without a layer count for every layer: they are taken only where they name all experts."""
        groups: dict[str, set[int]] = defaultdict(set)
        for text in texts:
            found = _layerless(text)
            if found is not None:
                groups[found[0]].add(found[1])
        for text in texts:
            found = _layerless(text)
            if found is not None and self.numbering.pruned and len(groups[found[0]]) < self.numbering.total:
                raise self._refusal(text, path)

    def _alike(self, text: str) -> bool:
        """Whether a text hits a kept expert's new name exactly when it hits the old one, however it is understood."""
        if not self.numbering.pruned:
            return True
        numbered = _NUMBERED.search(text) is not None
        if _PLAIN.fullmatch(text) and not numbered and not _has_loose_number(text):
            return True
        hit_any = False
        for hits in _readings(text):
            for (layer, _, _), names in self.numbering.names.items():
                found = [hits(name) for name in names]
                hit_any = hit_any or any(found)
                if any(found[old] != found[new] for new, old in enumerate(self.numbering.kept[layer])):
                    return False
        return hit_any or not numbered  # a number of an expert in no spelling that is understood

    def _refusal(self, text: str, path: tuple[str, ...]) -> UnsupportedModelError:
        key = ".".join(path) or "a key"
        return UnsupportedModelError(
            f"{self.where}: {key} names experts by {text!r}, which would mean other experts after pruning. Replace it "
            "by full module names (model.layers.0.mlp.experts.7.up_proj), which are renumbered, or by a pattern for "
            "all experts of a layer."
        )


def _speaks_of_experts(text: str) -> bool:
    return "expert" in text.lower()


def _named_expert(text: str) -> tuple[list[str], int, int] | None:
    """The parts of a full module name of one expert, the place of its number among them, and its layer."""
    if not _PLAIN.fullmatch(text):
        return None
    parts = text.split(".")
    layer = _number_after(parts, "layers")
    expert = _number_after(parts, "experts")
    if layer is None or expert is None or expert <= layer:
        return None
    return parts, expert, int(parts[layer])


def _layerless(text: str) -> tuple[str, int] | None:
    """A plain name of one expert in every layer: the name without the number, and the number."""
    if not _PLAIN.fullmatch(text) or _named_expert(text) is not None:
        return None
    parts = text.split(".")
    place = _number_after(parts, "experts")
    if place is None:
        return None
    return ".".join([*parts[:place], "*", *parts[place + 1 :]]), int(parts[place])


def _number_after(parts: Sequence[str], word: str) -> int | None:
    """The place of the number that follows a part."""
    places = (i + 1 for i, part in enumerate(parts[:-1]) if part == word and parts[i + 1].isdecimal())
    return next(places, None)


def _has_loose_number(text: str) -> bool:
    """Whether a plain name has a part that is a number and does not follow ``layers``."""
    parts = text.split(".")
    return any(part.isdecimal() and (i == 0 or parts[i - 1] != "layers") for i, part in enumerate(parts))


def _readings(text: str) -> Iterator[Callable[[str], bool]]:
    """The ways in which loaders may understand a text: as a part of a name, a glob, a regular expression."""
    prefixed = _PREFIXED.match(text)
    pattern = text[prefixed.end() :] if prefixed else text
    if not prefixed:
        if _PLAIN.fullmatch(text):
            yield lambda name: f".{text}." in f".{name}."
            return
        if any(sign in text for sign in "*?["):
            yield lambda name: fnmatch.fnmatchcase(name, text)
            yield lambda name: fnmatch.fnmatchcase(name, f"*{text}*")
    if _ALIKE.fullmatch(pattern) and not any(sign in text for sign in "*?[" if prefixed is None):
        return
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return
    for match in (compiled.match, compiled.search, compiled.fullmatch):
        yield lambda name, match=match: match(name) is not None  # type: ignore[misc]  # bound now, not when called
