"""How well scores predict what retraining does: linear datamodeling scores on the digits.

Run: python -m tests.benchmarks.lds

A network 64-32-16-10 on 1000 digits, 200 queries; 100 random halves of the training set, each trained from 5 seeds, all
at once as one batch of networks. The ceiling is what the outcomes of two of the seeds predict of the other three's.
"""

import argparse
import datetime
import itertools
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from distinfluence import CgInfluence, DirectInfluence, EkfacInfluence, RelativeDamping
from distinfluence.app import demo
from distinfluence.evaluate import linear_datamodeling_score

SIZES = (64, 32, 16, 10)
EPOCHS, BATCH, RATE, DECAY = 60, 50, 0.1, 1e-3
N_TRAIN, N_TEST, N_SUBSETS, N_SEEDS = 1000, 200, 100, 5


@dataclass
class Networks:
    """Many networks of one shape. layers: (weight [m, out, in], bias [m, 1, out]) of each layer."""

    layers: list[tuple[Tensor, Tensor]]

    @classmethod
    def new(cls, m: int, seed: int) -> "Networks":
        generator = torch.Generator().manual_seed(seed)
        layers = []
        for n_in, n_out in itertools.pairwise(SIZES):
            bound = n_in**-0.5
            weight = (torch.rand(m, n_out, n_in, generator=generator) * 2 - 1) * bound
            bias = (torch.rand(m, 1, n_out, generator=generator) * 2 - 1) * bound
            layers.append((weight.requires_grad_(), bias.requires_grad_()))
        return cls(layers)

    def __call__(self, x: Tensor) -> Tensor:
        """x [m, n, 64] → logits [m, n, 10]."""
        for number, (weight, bias) in enumerate(self.layers):
            x = torch.baddbmm(bias, x, weight.transpose(1, 2))
            x = torch.tanh(x) if number < len(self.layers) - 1 else x
        return x

    def train(self, x: Tensor, y: Tensor, members: Tensor, seed: int) -> None:
        """Stochastic gradient descent with momentum, each network on its own members [m, n] of the training set."""
        parameters = [p for layer in self.layers for p in layer]
        m, n = members.shape
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.SGD(parameters, lr=RATE, momentum=0.9, weight_decay=DECAY)
        total = EPOCHS * (n // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=total)
        for _ in range(EPOCHS):
            order = torch.rand(m, n, generator=generator).argsort(dim=1)
            for some in order.split(BATCH, dim=1):
                if some.shape[1] < BATCH:
                    break
                batch = members.gather(1, some)
                loss = nn.functional.cross_entropy(self(x[batch]).flatten(0, 1), y[batch].flatten(), reduction="sum")
                optimizer.zero_grad()
                (loss / BATCH).backward()
                optimizer.step()
                schedule.step()

    def single(self) -> nn.Module:
        """The first network as a module."""
        parts: list[nn.Module] = []
        for number, (weight, bias) in enumerate(self.layers):
            linear = nn.Linear(weight.shape[2], weight.shape[1])
            linear.load_state_dict({"weight": weight[0].detach(), "bias": bias[0, 0].detach()})
            parts += [linear] if number == len(self.layers) - 1 else [linear, nn.Tanh()]
        return nn.Sequential(*parts).eval()


def main() -> None:
    """Retrain, score, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    x, y = (part[:N_TRAIN] for part in demo.train_data())
    xt, yt = (part[:N_TEST] for part in demo.test_data())
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    halves = torch.stack([torch.randperm(N_TRAIN, generator=generator)[: N_TRAIN // 2] for _ in range(N_SUBSETS)])
    losses = []
    for seed in range(N_SEEDS):
        networks = Networks.new(N_SUBSETS, 100 + seed)
        networks.train(x, y, halves, 200 + seed)
        with torch.no_grad():
            logits = networks(xt.expand(N_SUBSETS, -1, -1))
            flat = nn.functional.cross_entropy(logits.flatten(0, 1), yt.repeat(N_SUBSETS), reduction="none")
        losses.append(flat.view(N_SUBSETS, N_TEST))
    subsets = np.zeros((N_SUBSETS, N_TRAIN), dtype=bool)
    subsets[np.arange(N_SUBSETS)[:, None], halves.numpy()] = True
    outcomes = -torch.stack(losses).double().mean(dim=0).numpy()
    base = Networks.new(1, 7)
    base.train(x, y, torch.arange(N_TRAIN)[None], 8)
    model = base.single()
    accuracy = float((model(xt).argmax(dim=1) == yt).float().mean())
    print(
        f"{datetime.date.today()}, torch {torch.__version__}; {N_SUBSETS} halves × {N_SEEDS} seeds trained in "
        f"{time.perf_counter() - start:.0f} s; accuracy of the model {accuracy:.1%}"
    )
    rows = {"gradient dot product": _dot(model, x, y, xt, yt)}
    loss = nn.CrossEntropyLoss()
    for damping in (1e-3, 1e-2, 1e-1):
        exact = DirectInfluence(model, loss, damping, second_order_mode="ggn").fit((x, y))
        rows[f"exact GGN, λ = {damping:g}"] = exact.influences(xt, yt, x, y)
    for name, update in (("KFAC", False), ("EKFAC", True)):
        ekfac = EkfacInfluence(model, update, RelativeDamping(0.1)).fit((x, y))
        rows[f"{name}, λ = 0.1·mean"] = ekfac.influences(xt, yt, x, y)
    for iterations in (1, 2, 5):
        refined = EkfacInfluence(model, True, 1e-2, cg_iterations=iterations).fit((x, y))
        rows[f"EKFAC + {iterations} CG, λ = 1e-2"] = refined.influences(xt, yt, x, y)
    plain = CgInfluence(model, loss, 1e-2, rtol=1e-6, maxiter=5, use_block_cg=False, second_order_mode="ggn")
    rows["5 CG without EKFAC, λ = 1e-2"] = plain.fit((x, y)).influences(xt, yt, x, y)
    for name, scores in rows.items():
        found = linear_datamodeling_score(scores.detach().numpy(), subsets, outcomes)
        print(f"{name:32} LDS {found.mean:.3f} ± {found.standard_error:.3f}")
    first = -torch.stack(losses[:2]).double().mean(dim=0)
    rest = -torch.stack(losses[2:]).double().mean(dim=0)
    both = [
        np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1] for a, b in zip(first.T, rest.T, strict=True)
    ]
    print(f"{'two seeds of the other three':32} LDS {np.mean(both):.3f}")


def _dot(model: nn.Module, x: Tensor, y: Tensor, xt: Tensor, yt: Tensor) -> Tensor:
    influence = EkfacInfluence(model, True, 1.0).fit((x, y))
    gradients = influence.loss_gradients(influence.place(xt, yt)).rows
    return influence.influences_from_factors(gradients, x, y)


if __name__ == "__main__":
    main()
