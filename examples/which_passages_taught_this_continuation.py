"""Which passages taught a character-level transformer this continuation?

Text that ships with Python, the Zen (`import this`) and the language reference that `help()` shows, cut into passages
of 64 characters. A small causal transformer learns them. Asked to go on after a prompt from the Zen, which passages
made the right continuation likely, and through which characters? EKFAC scores every position of every passage.

About 20 seconds on one core. Prints the passages that helped most, and where in the right one the help comes from;
draws them, coloured by character, in passages.png.

    python examples/which_passages_taught_this_continuation.py --out .
"""

import argparse
import codecs
import contextlib
import importlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from distinfluence import EkfacInfluence, LanguageModelObjective, RelativeDamping

LENGTH, N_REFERENCE = 64, 200
PROMPT, CONTINUATION = "Beautiful is better", " than ugly."
SHOWN = 5


@dataclass(frozen=True)
class Findings:
    """rank: place, from 1, of the passage that holds the continuation; n_passages: of so many.

    best: the passages that helped most. difference: of a passage's score and the sum over its characters, relative to
    the largest score. share_in_continuation: of the first passage's positive score, what falls on the continuation.
    """

    rank: int
    n_passages: int
    best: list[str]
    difference: float
    share_in_continuation: float


class Transformer(nn.Module):
    """Causal, two blocks of width 48, characters in, logits of the next character out."""

    def __init__(self, n_characters: int, width: int = 48) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(n_characters, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, n_characters)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[n, T] → [n, T, characters]."""
        x = self.characters(input_ids) + self.places(torch.arange(input_ids.shape[1])).expand(len(input_ids), -1, -1)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    """Attention over what came before, then two layers at each position."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, T, width] → the same."""
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.mixed(self.first(x)).chunk(3, dim=2)
        )
        weights = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        attended = weights.masked_fill(future, -math.inf).softmax(dim=3) @ value
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        further: Tensor = self.narrow(nn.functional.gelu(self.wide(self.second(x))))
        return x + further


def main(out: Path) -> Findings:
    """Train, ask, print, draw."""
    texts = passages()
    alphabet = sorted(set("".join(texts)))
    ids = torch.tensor([[alphabet.index(c) for c in text] for text in texts])
    model = trained(ids, len(alphabet))

    asked = torch.tensor([[alphabet.index(c) for c in PROMPT + CONTINUATION]])
    labels = asked.clone()
    labels[:, : len(PROMPT)] = -100  # only the continuation counts
    query, train = {"input_ids": asked, "labels": labels}, {"input_ids": ids}

    influence = EkfacInfluence(
        model,
        update_diagonal=True,
        hessian_regularization=RelativeDamping(0.1),
        loss=LanguageModelObjective(),
    ).fit(train)
    by_token = influence.influences_by_token(query, None, train)[0].numpy()  # [passage, position]
    whole = influence.influences(query, None, train)[0].numpy()

    order = np.argsort(-whole)
    source = next(i for i, text in enumerate(texts) if PROMPT + CONTINUATION in text)
    # position t holds what was learnt by predicting character t + 1
    begin = texts[source].index(CONTINUATION) - 1
    helped = by_token[source].clip(min=0)
    found = Findings(
        rank=1 + int(np.flatnonzero(order == source)[0]),
        n_passages=len(texts),
        best=[texts[i] for i in order[:SHOWN]],
        difference=float(np.abs(by_token.sum(axis=1) - whole).max() / np.abs(whole).max()),
        share_in_continuation=float(helped[begin : begin + len(CONTINUATION)].sum() / helped.sum()),
    )
    print(f"{PROMPT!r} → {CONTINUATION!r}. Of {len(texts)} passages, these helped most:")
    for i in order[:SHOWN]:
        print(f"  {whole[i]:9.3f}  {texts[i]!r}")
    print(f"The passage that holds the continuation has rank {found.rank}; {found.share_in_continuation:.0%} of what")
    print(f"helps in it falls on the {len(CONTINUATION)} characters of the continuation, of {LENGTH}.")
    draw(out / "passages.png", [texts[i] for i in order[:SHOWN]], by_token[order[:SHOWN]])
    return found


def passages() -> list[str]:
    """The Zen, then the reference, in passages of 64 characters, line breaks taken as spaces."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints itself when imported
        zen = codecs.decode(importlib.import_module("this").s, "rot13")
    poem = " ".join(zen.split())
    reference = " ".join("".join(topics[name] for name in sorted(topics)).split())
    reference = "".join(c for c in reference if c.isascii())[: N_REFERENCE * LENGTH]
    return [text[i : i + LENGTH] for text in (poem, reference) for i in range(0, len(text) - LENGTH + 1, LENGTH)]


def trained(ids: Tensor, n_characters: int) -> Transformer:
    """After 60 epochs."""
    torch.manual_seed(0)
    model = Transformer(n_characters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        for batch in torch.randperm(len(ids)).split(32):
            optimizer.zero_grad()
            logits = model(ids[batch])[:, :-1]
            nn.functional.cross_entropy(logits.flatten(0, 1), ids[batch, 1:].flatten()).backward()
            optimizer.step()
    return model.eval()


def draw(path: Path, texts: list[str], scores: np.ndarray) -> None:
    """Each character on the colour of what was learnt by predicting it."""
    figure = Figure(figsize=(10, 0.42 * len(texts) + 0.7), layout="constrained")
    axes = figure.subplots()
    shifted = np.concatenate([np.zeros((len(texts), 1)), scores], axis=1)[:, :LENGTH]
    edge = np.abs(shifted).max()
    axes.imshow(shifted, cmap="PuOr", vmin=-edge, vmax=edge, aspect="auto")
    for row, text in enumerate(texts):
        for place, character in enumerate(text):
            ink = "white" if abs(shifted[row, place]) > edge / 2 else "black"
            axes.text(place, row, character, color=ink, ha="center", va="center", family="monospace", fontsize=9)
    axes.set(xticks=[], yticks=[])
    axes.set_title(f"“{PROMPT}” → “{CONTINUATION}”: purple characters helped, orange ones harmed", fontsize=10)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture")
    main(parser.parse_args().out)
