"""Four-bit floating-point numbers (one sign bit, two of exponent, one of mantissa), two in a byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpacked_fp4(blocks: torch.Tensor) -> torch.Tensor:
    """The values of bytes ``[..., B]``, the lower half of a byte first: float32 ``[..., 2B]``."""
    import torch

    return fp4_values(torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2))


def fp4_values(codes: torch.Tensor) -> torch.Tensor:
    """The values of codes from 0 to 15: float32."""
    import torch

    table = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=torch.float32)
    return table[codes.to(torch.int32)]


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """The scales that biased exponents (bytes) stand for: ``2 ** (byte - 127)``, float32."""
    import torch

    wide = exponents.to(torch.int32)
    return torch.where(wide == 0, 1 << 22, wide << 23).view(torch.float32)  # 0 stands for a number without a leading 1
