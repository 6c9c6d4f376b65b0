"""Small whole numbers packed into 32-bit words: a stream of bits, the lowest first."""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_WORD = 32


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack the last dimension.

    Args:
        words: 32-bit words ``[..., W]``.
        bits: width of the numbers, 1 to 8; a number may lie in two words.

    Returns:
        int32 ``[..., W * 32 // bits]``, from 0 to ``2**bits - 1``.
    """
    import torch

    words = words.view(torch.int32) if words.dtype != torch.int32 else words
    mask = 2**bits - 1
    if _WORD % bits == 0:
        shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
        narrow: torch.Tensor = ((words[..., None] >> shifts) & mask).flatten(-2)
        return narrow
    period = lcm(_WORD, bits) // _WORD  # words after which the pattern repeats
    whole = words.shape[-1] // period * period
    if whole != words.shape[-1]:
        raise ValueError(f"{words.shape[-1]} words do not hold whole groups of {bits}-bit numbers")
    wide = (words.to(torch.int64) & 0xFFFFFFFF).reshape(*words.shape[:-1], -1, period)
    wide = torch.nn.functional.pad(wide, (0, 1))
    offsets = torch.arange(0, period * _WORD, bits)
    place, shift = offsets // _WORD, offsets % _WORD
    low = wide[..., place] >> shift
    high = wide[..., place + 1] << (_WORD - shift)
    numbers: torch.Tensor = ((low | high) & mask).to(torch.int32).flatten(-2)
    return numbers


def packed_count(words: int, bits: int) -> int:
    """Numbers of a width that a count of 32-bit words holds."""
    return words * _WORD // bits
