"""The tokenizer of a GGUF file: built by Transformers from the metadata, with text split as the file says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.gguf_file import read_gguf
from shape_moe.errors import CheckpointError, UnsupportedModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BY_TRANSFORMERS = ("gpt-2", "olmo", "qwen2", "llama-bpe", "llama3", "llama-v3", "gpt-4o", "tekken", "deepseek-r1-qwen")
"""Ways to split text (``tokenizer.ggml.pre``) that Transformers sets up from their names."""
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GLM = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "starcoder": (r"\p{N}", _GPT2),
    "smollm": (r"\p{N}", _GPT2),
    "command-r": (r"\p{N}", _GPT2),
    "glm4": (_GLM,),
    "chatglm-bpe": (_GLM,),
    "deepseek-v3": _DEEPSEEK,
}
"""Patterns by which further ways split text, one after the other; those that llama.cpp has for these names."""
_ADVICE = "name a folder with the original tokenizer: --tokenizer DIR."


def load_gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """Build the tokenizer that a file's metadata describe, chat template included.

    Raises:
        CheckpointError: when there is none, or it is damaged.
        UnsupportedModelError: for a kind of tokenizer, or a way to split text, that would give other tokens here.
    """
    metadata = read_gguf(file).metadata
    kind, way = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if not metadata.get("tokenizer.ggml.tokens"):
        raise CheckpointError(f"{file} has no tokenizer in its metadata: {_ADVICE}")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(f"{file} has a tokenizer of the kind {kind!r}, which is not read: {_ADVICE}")
    if kind == "gpt2" and way not in (*_BY_TRANSFORMERS, *SPLITS):
        raise UnsupportedModelError(
            f"{file} splits text in the way {way!r}, which is not known here (the model would read other tokens): "
            f"{_ADVICE}"
        )
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)
        if kind == "gpt2" and way in SPLITS:
            _split_by(tokenizer, SPLITS[way])
        elif kind == "llama":
            _space_as_pieces(tokenizer, prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)))
    except Exception as error:  # a damaged vocabulary can make the libraries raise anything
        raise CheckpointError(
            f"{file} has no tokenizer that can be loaded: {type(error).__name__} {first_line(error)}; {_ADVICE}"
        ) from error
    _check_ids(tokenizer, metadata, file)
    return tokenizer


def _split_by(tokenizer: PreTrainedTokenizerBase, patterns: tuple[str, ...]) -> None:
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


def _space_as_pieces(tokenizer: PreTrainedTokenizerBase, *, prefix: bool) -> None:
    """Let pieces begin with spaces as SentencePiece has it: one is put before every text, also one that begins so."""
    from tokenizers import normalizers

    steps: list[Any] = [normalizers.Prepend("\u2581")] if prefix else []
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    tokenizer.backend_tokenizer.pre_tokenizer = None


def _check_ids(tokenizer: PreTrainedTokenizerBase, metadata: Mapping[str, Any], file: Path) -> None:
    """Make sure that tokens have the ids that the model knows them by."""
    found = tokenizer.get_vocab()
    wrong = [token for index, token in enumerate(metadata["tokenizer.ggml.tokens"]) if found.get(token, index) != index]
    if wrong:
        raise CheckpointError(f"{file}: {len(wrong):,} tokens have other ids than the metadata list; {_ADVICE}")
