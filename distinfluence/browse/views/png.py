"""Pictures as PNG without a library: images of samples, and matrices in blue (helps) and orange (harms)."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

HELPS = (33, 102, 172)
HARMS = (200, 80, 20)
UNFINISHED = (170, 170, 170)


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """Return a PNG file.

    Args:
        pixels: [h, w] grey or [h, w, 3] red, green, blue.
    """
    height, width = pixels.shape[:2]
    colour = 2 if pixels.ndim == 3 else 0
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 6)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_part(name, content) for name, content in parts)


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """Return the PNG within a URI."""
    return "data:image/png;base64," + base64.b64encode(encode(pixels)).decode()


def colours(values: NDArray[np.float32], scale: float) -> NDArray[np.uint8]:
    """Colour [h, w] as [h, w, 3]: white at 0, full colour from ±scale on; grey where there is no finite value."""
    known = np.isfinite(values)
    share = np.clip(np.where(known, values, 0.0) / (scale or 1.0), -1.0, 1.0)[..., np.newaxis]
    full = np.where(share > 0, np.array(HELPS), np.array(HARMS))
    pixels = 255.0 + np.abs(share) * (full - 255.0)
    pixels[~known] = UNFINISHED
    return pixels.round().astype(np.uint8)


def robust_scale(values: NDArray[np.float32]) -> float:
    """Return the 99th percentile of the magnitudes, 1 if there is none: a few large entries do not blanch the rest."""
    magnitudes = np.abs(values[np.isfinite(values)])
    scale = float(np.quantile(magnitudes, 0.99)) if magnitudes.size else 0.0
    return scale if scale > 0 else float(magnitudes.max(initial=0.0)) or 1.0


def _part(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
