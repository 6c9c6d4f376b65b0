"""The lines that terminal, model card and report open with: method, size, verdict, cost, and what is next."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from math import ceil

from shape_moe.architectures.snapshot import looks_like_path
from shape_moe.embedded_model import EMBEDDED, embedded_model_path
from shape_moe.evaluation.evaluated import Chosen, Evaluated
from shape_moe.evaluation.verdict import Verdict, Word
from shape_moe.selection.method import PUBLISHED, PUBLISHED_SAMPLES, Method
from shape_moe.selection.selection import Selection
from shape_moe.tracing.token_weights import SegmentWeights, token_weights
from shape_moe.units import counted, readable_share, readable_size

_STEPS = 20
"""Keep rates that are proposed are multiples of one part in so many."""


def short_name(model: str) -> str:
    """A model's name for people: a hub id as it is, of a path its last part.

    A folder ``model`` is named together with the one that it lies in, and the embedded model by its name.
    """
    if model == str(embedded_model_path()):
        return EMBEDDED
    name = model.replace("\\", "/").rstrip("/")
    parts = name.split("/")
    is_path = looks_like_path(name) or name.count("/") > 1
    return "/".join(parts[-2:] if parts[-1] == "model" else parts[-1:]) if is_path else name


def full_method(selection: Selection, samples: int | None) -> str:
    """A selection's method in words, with whether it is the published one.

    Args:
        selection: the selection.
        samples: how many examples it was calibrated with, None where that is not known.
    """
    method = selection.method
    words = [method.pair, method.routed, method.target]
    words += [counted(samples, "calibration example")] if samples is not None else []
    if selection.classes:
        count = f"{len(selection.classes)} classes"
        words.append(f"{count} added up" if selection.pooled else f"{count} each for its own sake")
    told = "not the published SHAPE method"
    if method == PUBLISHED and _unconstrained(selection):
        if samples is None:
            told = f"the published SHAPE method if it was calibrated with {PUBLISHED_SAMPLES} examples"
        elif samples == PUBLISHED_SAMPLES:
            told = "the published SHAPE method"
    return f"{', '.join(words)} ({told})"


def _unconstrained(selection: Selection) -> bool:
    """Whether nothing but the budget decided which experts stay, with all tokens counted alike."""
    rules = selection.constraints
    alike = token_weights(selection.options) in (None, SegmentWeights())
    free = not rules.get("skip_layers") and not rules.get("protect") and rules.get("multiple_of", 1) == 1
    pooled = len(selection.classes) < 2 or selection.pooled
    return free and pooled and alike


def smaller(before: int, after: int) -> str:
    """How much smaller a model has become, in a few words."""
    if before <= 0 or after >= before:
        return "Not smaller"
    return f"{readable_share(1 - after / before)} smaller"


def size_line(name: str, selection: Selection | None, sizes: tuple[int, int] | None) -> str:
    """How much smaller, in bytes and in experts, with what the model is.

    Args:
        name: of the model.
        selection: what is kept, None where that is not known.
        sizes: bytes of all weights before and after, None where they are not known.
    """
    what = name
    if selection is not None:
        what += f" ({counted(len(selection.layers), 'layer')} of {counted(selection.num_experts, 'expert')})"
    parts = []
    if sizes is not None:
        before, after = sizes
        word = smaller(before, after)
        parts.append(f"{word[0].lower()}{word[1:]}, from {readable_size(before)} to {readable_size(after)}")
    if selection is not None:
        parts.append(f"{selection.kept:,} of {selection.total:,} experts kept")
    return f"{what}: {'; '.join(parts)}." if parts else f"{what}."


def evaluated_line(model: Evaluated, dense: int | None) -> str:
    """How much smaller a model is that was judged, and how it was made.

    Args:
        model: the model.
        dense: bytes of the dense model's weights, None where they are not known.
    """
    parts, chosen = [], model.selection
    if dense and model.size is not None:
        word = smaller(dense, model.size)
        parts.append(f"{word[0].lower()}{word[1:]}, from {readable_size(dense)} to {readable_size(model.size)}")
    if chosen is not None:
        how = f"{chosen.scorer}/{chosen.rule}, {chosen.routing}"
        parts.append(f"{readable_share(chosen.keep)} of the experts kept by {how}")
    shape = Chosen.of(chosen).shape if chosen is not None else ""
    name = f"{model.name} ({shape})" if shape else model.name
    return f"{name}: {'; '.join(parts)}." if parts else f"{name}."


@dataclass(frozen=True)
class Opening:
    """What a reader must know of a pruned model, first of all.

    Attributes:
        method: how it was made, a sentence.
        size: how much smaller it is, a sentence.
        verdict: what pruning did to it, None where that was not judged.
    """

    method: str
    size: str
    verdict: Verdict | None = None

    @classmethod
    def of(
        cls,
        model: str,
        selection: Selection,
        sizes: tuple[int, int] | None,
        samples: int | None,
        verdict: Verdict | None = None,
    ) -> Opening:
        """For a pruned model.

        Args:
            model: the original's name, as it was given.
            selection: what is kept.
            sizes: bytes of all weights before and after, None where they are not known.
            samples: how many examples calibrated, None where that is not known.
            verdict: what pruning did to it.
        """
        method = f"Method: {full_method(selection, samples)}."
        return cls(method, size_line(short_name(model), selection, sizes), verdict)

    def lines(self) -> list[str]:
        """As people read them."""
        return [self.method, self.size, *(self.verdict.lines() if self.verdict is not None else ())]


def next_commands(
    model: str, pruned: str, verdict: Verdict | None, *, keep: float, method: Method, data: str | None = None
) -> list[str]:
    """What to type next, for what the verdict says.

    Args:
        model: the original.
        pruned: the pruned checkpoint's folder or GGUF file.
        verdict: what pruning did, None where it was not judged.
        keep: its keep rate.
        method: how it was made.
        data: the options that name the calibration examples again, None where they are not known.
    """
    original, smaller_one = shlex.quote(model), shlex.quote(pruned)
    if verdict is not None and verdict.word in {Word.LOSS, Word.DAMAGED}:
        more, source = next_keep_rate(keep), data or "--data TASK.jsonl"
        how = f"--keep {more:.4g} --method {shlex.quote(str(method))}"
        stem, gguf = (pruned.removesuffix(".gguf"), ".gguf") if pruned.endswith(".gguf") else (pruned, "")
        larger = shlex.quote(f"{stem}-larger{gguf}")
        return [f"shape-moe prune {original} {source} {how} -o {larger}"] if more < 1 else []
    if verdict is not None and verdict.word is Word.SAFE:
        return []
    return [f"shape-moe evaluate {original} {smaller_one} --data HELD_OUT.jsonl -o evaluation.json"]


def next_keep_rate(keep: float) -> float:
    """The keep rate to try where this one lost too much: at least a fifth of the removed experts come back."""
    return min(1.0, ceil((keep + (1 - keep) / 5) * _STEPS - 1e-9) / _STEPS)
