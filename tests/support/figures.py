"""Looking into the report's figures."""

from __future__ import annotations

import base64

import numpy as np

_KINDS = {"f4": np.float32, "u1": np.uint8, "u2": np.uint16, "i4": np.int32}


def unpacked(array: dict[str, str]) -> np.ndarray:
    """The numbers of a binary array."""
    flat = np.frombuffer(base64.b64decode(array["bdata"]), dtype=_KINDS[array["dtype"]])
    return flat.reshape([int(n) for n in array["shape"].split(",")]) if "shape" in array else flat
