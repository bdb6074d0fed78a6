"""What an influence is made of, as the page shows it: by block of parameters, and by position of a text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distinfluence.browse.views.rendering import PointSource, Tokens
from distinfluence.store import Sample

SHOWN_BLOCKS = 8
SHOWN_TOKENS = 400
MAX_PIECE = 60  # letters of one token


def strongest_blocks(names: list[str], values: NDArray[np.float32]) -> list[tuple[str, float]]:
    """Return blocks in their own order with their share; of many, those of largest magnitude and the sum of the others.

    Args:
        names: [n_blocks].
        values: [n_blocks].
    """
    if values.size <= SHOWN_BLOCKS:
        return list(zip(names, values.tolist(), strict=True))
    chosen = np.sort(np.argsort(-np.abs(values), kind="stable")[: SHOWN_BLOCKS - 1])
    rest = float(values.sum(dtype=np.float64) - values[chosen].sum(dtype=np.float64))
    others = f"{values.size - chosen.size} others"
    return [*((names[i], float(values[i])) for i in chosen.tolist()), (others, rest)]


def on_tokens(source: PointSource, index: int, values: NDArray[np.float32]) -> list[tuple[str, float]]:
    """Return the pieces of sample `index`, each with its share, as far as they are shown.

    The pieces are its `Tokens`, or the words of a text that has as many; otherwise positions are numbered.

    Args:
        source: The samples of the axis.
        index: Which sample.
        values: The shares, [n_tokens], NaN beyond the sample's end.
    """
    known = np.flatnonzero(np.isfinite(values))
    n = int(known[-1]) + 1 if known.size else 0
    pieces = _pieces(source.sample(index), n)
    shown = zip(pieces[:SHOWN_TOKENS], np.nan_to_num(values[:n]).tolist(), strict=False)
    return [(piece[:MAX_PIECE], value) for piece, value in shown]


def _pieces(sample: object, n: int) -> list[str]:
    if isinstance(sample, Tokens) and len(sample.texts) >= n:
        return list(sample.texts[:n])
    text = sample.values if isinstance(sample, Sample) else sample
    words = text.split() if isinstance(text, str) else []
    return [f"{word} " for word in words] if len(words) == n else [f"{i} " for i in range(n)]
