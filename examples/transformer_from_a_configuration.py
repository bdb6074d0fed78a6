"""How do I score a Hugging Face model?

A GPT-2 made from a configuration, small and with random weights, so that nothing is downloaded; one of your own goes
the same way. Batches are dicts, as tokenizers make them: token ids, attention mask, and labels of -100 where padding
stands. The embedding and the head share a weight, which counts once.

What can a model with random weights show? That a sequence which differs from a query in one token is the one that
moves the query most, among 64; that padding changes nothing; and that every parameter is covered.

About 15 seconds on one core, most of it for importing `transformers` (`pip install transformers`). Prints these three;
draws the scores in transformer.png.

    python examples/transformer_from_a_configuration.py --out .
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from distinfluence import EkfacInfluence, LanguageModelObjective, RelativeDamping

N_TRAIN, N_TEST, LENGTH, PADDED = 64, 8, 12, 16
VOCABULARY = 50


@dataclass(frozen=True)
class Findings:
    """n_found: queries whose nearly equal training sequence has the highest score; expected: by chance.

    n_parameters: covered by the scores; n_in_model: of the model, shared ones once. difference: what padding changes,
    relative to the largest score.
    """

    n_found: int
    expected: float
    n_parameters: int
    n_in_model: int
    difference: float


def main(out: Path) -> Findings:
    """Build, score with and without padding, print, draw."""
    model = transformer()
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (N_TRAIN, LENGTH))
    asked = ids[:N_TEST].clone()
    asked[:, LENGTH // 2] = torch.randint(1, VOCABULARY, (N_TEST,))  # query i is training sequence i but for one token
    train, queries = batch(ids, PADDED), batch(asked, PADDED)

    influence = EkfacInfluence(
        model,
        update_diagonal=True,
        hessian_regularization=RelativeDamping(0.1),
        loss=LanguageModelObjective(),
    ).fit(train)
    scores = influence.influences(queries, None, train).numpy()
    unpadded = influence.influences(batch(asked, LENGTH), None, batch(ids, LENGTH)).numpy()

    found = Findings(
        n_found=int((scores.argmax(axis=1) == np.arange(N_TEST)).sum()),
        expected=N_TEST / N_TRAIN,
        n_parameters=influence.n_parameters,
        n_in_model=sum(p.numel() for p in model.parameters()),
        difference=float(np.abs(scores - unpadded).max() / np.abs(scores).max()),
    )
    print(f"{found.n_parameters} of {found.n_in_model} parameters are covered, the shared weight once.")
    print(
        f"For {found.n_found} of {N_TEST} queries the training sequence that differs in one token comes first among "
        f"{N_TRAIN}; by chance {found.expected:.2g} would."
    )
    print(f"Padding from {LENGTH} to {PADDED} tokens changes scores by {found.difference:.0e} of the largest.")
    draw(out / "transformer.png", scores)
    return found


def transformer() -> torch.nn.Module:
    """Two layers of width 32, random weights."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise  # it is there, and something that it needs is not
        sys.exit("This example needs transformers, which is not installed. Run: pip install transformers")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=PADDED, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model: torch.nn.Module = GPT2LMHeadModel(config)
    return model.eval()  # no dropout


def batch(ids: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
    """Sequences [n, T] padded to a length, as a tokenizer's dict with labels."""
    missing = (0, length - ids.shape[1])
    pad = torch.nn.functional.pad
    mask = pad(torch.ones_like(ids), missing)
    return {"input_ids": pad(ids, missing), "attention_mask": mask, "labels": pad(ids, missing, value=-100)}


def draw(path: Path, scores: np.ndarray) -> None:
    """The matrix."""
    figure = Figure(figsize=(8, 1.9), layout="constrained")
    axes = figure.subplots()
    edge = np.abs(scores).max()
    picture = axes.imshow(scores, cmap="PuOr", vmin=-edge, vmax=edge, aspect="auto")
    axes.set(xlabel="training sequence", ylabel="query")
    figure.colorbar(picture, label="influence")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture")
    main(parser.parse_args().out)
