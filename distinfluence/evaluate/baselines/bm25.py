"""BM25: how much the words of a training text say about those of a test text. No model takes part.

    score(q, d) = Σ_{w in q} idf(w) · tf / (tf + k1·(1 − b + b·|d| / avg|d|))
    idf(w) = ln(1 + (N − n_w + ½) / (n_w + ½))

with tf how often the word is in d, n_w the number of training texts that have it, and a word that is twice in q counted
twice: the variant of Lucene since version 8, as the package bm25s implements it. Memory: the words of both sides, and a
strip.

References:
    Robertson & Zaragoza (2009), "The probabilistic relevance framework"; Lù (2024), "BM25S"; Kamphuis et al. (2020).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from distinfluence.errors import MissingDependencyError, SettingError
from distinfluence.evaluate.baselines.points import Points, Texts, fingerprint_texts
from distinfluence.evaluate.baselines.rules import Baseline, Scores, Strip

MOST_K1 = 1e6  # Above it, repeated words count in full to rounding.
WORD = r"(?u)\b\w\w+\b"  # Two letters, digits or underscores at least, of any script.


@dataclass(frozen=True, eq=False)
class Bm25(Baseline):
    """BM25 of test texts (queries) in training texts (documents), Lucene's variant, by the package bm25s.

    Words are runs of two or more letters or digits of any script, in lower case; none is left out as too common, and
    endings are kept. Texts without a common word score 0, empty ones, too.

    Args:
        texts: The texts: a pair of lists (test, train), the name of a field of the samples, or a callable that makes a
            text of a sample. None where the data themselves are lists of texts.
        k1: How soon repeated words stop counting, ≥ 0.
        b: How much long texts are discounted, 0 to 1.

    Raises:
        SettingError: If a setting is out of range.
        MissingDependencyError: If bm25s is not installed.
    """

    method: ClassVar[str] = "bm25"
    remark: ClassVar[str] = "BM25 of the texts: no model was used."
    texts: Texts = None
    k1: float = 1.5
    b: float = 0.75

    def __post_init__(self) -> None:
        for name, most, usual in (("k1", MOST_K1, 1.5), ("b", 1.0, 0.75)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise SettingError(f"`{name}` must be a number from 0 to {most:g}, got {value!r}. Take {usual}.")
        if not (self.texts is None or callable(self.texts) or isinstance(self.texts, str | tuple)):
            raise SettingError(
                f"`texts` must be a pair of lists (test, train), the name of a field or a callable, got "
                f"{type(self.texts).__name__}."
            )
        _package()

    @override
    def settings(self) -> dict[str, object]:
        return {"variant": "lucene", "k1": float(self.k1), "b": float(self.b), "words": WORD}

    @override
    def begin(self, test: Points, train: Points) -> Scores:
        return _Index(test.texts(self.texts), train.texts(self.texts), self)


class _Index(Scores):
    """The scores of each word in each training text, and the words of each test text."""

    def __init__(self, test: Sequence[str], train: Sequence[str], rule: Bm25) -> None:
        self.fingerprints = {"test_texts": fingerprint_texts(test), "train_texts": fingerprint_texts(train)}
        package = _package()
        words: dict[str, Any] = {"token_pattern": WORD, "stopwords": None, "show_progress": False}
        documents, vocabulary = package.tokenize(list(train), return_ids=True, **words)
        self._n_test, n_words = len(test), max(1, len(vocabulary))
        asked = [
            [vocabulary[word] for word in query if word in vocabulary]
            for query in package.tokenize(list(test), return_ids=False, **words)
        ]
        lengths = [len(query) for query in asked]
        place = torch.tensor(
            [[i for i, n in enumerate(lengths) for _ in range(n)], [word for query in asked for word in query]]
        ).long()
        ones = torch.ones(place.shape[1], dtype=torch.float64)
        self._queries = torch.sparse_coo_tensor(place, ones, (len(test), n_words), check_invariants=True).coalesce()
        self._starts = np.zeros(len(train) + 1, dtype=np.int64)
        self._words: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._scores: NDArray[np.float64] = np.zeros(0)
        if vocabulary:
            index = package.BM25(k1=rule.k1, b=rule.b, method="lucene", dtype="float64")
            index.index((documents, vocabulary), create_empty_token=False, show_progress=False)
            self._take(index.scores, len(train))

    def _take(self, columns: dict[str, Any], n_train: int) -> None:
        """Keep scores document by document, where the package has them word by word."""
        texts = np.asarray(columns["indices"], dtype=np.int64)
        words = np.repeat(np.arange(len(columns["indptr"]) - 1), np.diff(columns["indptr"]))
        order = np.argsort(texts, kind="stable")
        self._words, self._scores = words[order], np.asarray(columns["data"], dtype=np.float64)[order]
        self._starts = np.searchsorted(texts[order], np.arange(n_train + 1))

    @override
    def strip(self, index: int, start: int, stop: int) -> Strip:
        own = slice(int(self._starts[start]), int(self._starts[stop]))
        words, row = np.unique(self._words[own], return_inverse=True)
        column = np.repeat(np.arange(stop - start), np.diff(self._starts[start : stop + 1]))
        if not len(words):
            return Strip(np.zeros((self._n_test, stop - start)))
        dense = torch.zeros(len(words), stop - start, dtype=torch.float64)
        dense[torch.from_numpy(row), torch.from_numpy(column)] = torch.from_numpy(self._scores[own])
        queries = self._queries.index_select(1, torch.from_numpy(words)).coalesce()
        return Strip(torch.sparse.mm(queries, dense).numpy())


def _package() -> ModuleType:
    try:
        import bm25s
    except ImportError:
        raise MissingDependencyError("BM25 needs bm25s, which is not installed. Run `pip install bm25s`.") from None
    found: ModuleType = bm25s
    return found
