"""Ours beside pyDVL 0.10 and curvlinops 3.0.1: same model, data, dtype and threads, at equal achieved error.

Run: python -m tests.benchmarks.peers [--models cnn] [--dampings 0.01]

Each peer gets an environment of its own, made on first use. What is timed is `fit` and `influences` of 64 test points
on 1500 training points, in a process of its own that has warmed up. Errors are ‖Î − I‖/‖I‖ against dense float64
matrices made here with torch.func. Where a method has a tolerance, ours is set to the loosest of a ladder whose error
is not larger than the peer's. A peer whose error is above one half is shown as wrong and left out of the means, as is
one that takes longer than the limit, whose ratio is a lower bound.
"""

import argparse
import datetime
import json
import math
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

from distinfluence.app.demo import test_data, train_data
from tests.benchmarks.environments import FOLDER, PEERS, python_of
from tests.benchmarks.peers.models import build

HERE = Path(__file__).parent
RIVALS = ("pydvl", "curvlinops")
LADDER = (0.3, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)
WRONG = 0.5  # relative error above which a result is no approximation any more


@dataclass
class Problem:
    """A trained model with its data, and the exact influences by matrix and damping."""

    name: str
    file: Path
    gradients: Tensor
    tests: Tensor
    matrices: dict[str, Tensor] = field(default_factory=dict)

    def exact(self, matrix: str, damping: float, method: str) -> NDArray[np.float64]:
        if method == "datainf":
            weights = 1 / (damping + self.gradients.square().sum(dim=1))
            shrunk = (self.tests @ self.gradients.T * weights) @ self.gradients / len(self.gradients)
            factors = (self.tests - shrunk) / damping
        else:
            a = self.matrices[matrix] + damping * torch.eye(self.tests.shape[1], dtype=torch.float64)
            factors = torch.linalg.solve(a, self.tests.T).T
        scores: NDArray[np.float64] = (factors @ self.gradients.T).numpy()
        return scores


def problem(name: str, folder: Path) -> Problem:
    """Train for a few seconds, save, and make the dense references."""
    x, y = train_data()
    xt, yt = (part[:64] for part in test_data())
    net = build(name).train()
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(30):
        for batch in torch.randperm(len(y)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    net.eval()
    file = folder / f"{name}.pt"
    torch.save({"state": net.state_dict(), "x": x, "y": y, "xt": xt, "yt": yt}, file)
    wide = net.double()
    parameters = {n: p.detach() for n, p in wide.named_parameters()}

    def of_one(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(wide, p, (a[None],)), b[None])

    def gradients(a: Tensor, b: Tensor) -> Tensor:
        parts = vmap(grad(of_one), in_dims=(None, 0, 0))(parameters, a.double(), b)
        return torch.cat([part.flatten(1) for part in parts.values()], dim=1)

    made = Problem(name, file, gradients(x, y), gradients(xt, yt))
    made.matrices["empirical_fisher"] = made.gradients.T @ made.gradients / len(y)
    made.matrices["hessian"] = dense_hessian(wide, parameters, x.double(), y)
    made.matrices["ggn"] = dense_ggn(wide, parameters, x.double())
    return made


def dense_hessian(net: nn.Module, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """[p, p] of the mean loss, column by column."""
    sizes = [p.numel() for p in parameters.values()]

    def gradient(flat: Tensor) -> Tensor:
        parts = dict(zip(parameters, flat.split(sizes), strict=True))
        shaped = {name: part.view_as(parameters[name]) for name, part in parts.items()}
        slope = grad(lambda q: nn.functional.cross_entropy(functional_call(net, q, (x,)), y))(shaped)
        return torch.cat([slope[name].flatten() for name in parameters])

    at = torch.cat([p.flatten() for p in parameters.values()])
    columns = [
        vmap(lambda v: jvp(gradient, (at,), (v,))[1])(block) for block in torch.eye(len(at), dtype=at.dtype).split(32)
    ]
    matrix = torch.cat(columns)
    return (matrix + matrix.T) / 2


def dense_ggn(net: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """[p, p]: (1/N) Σ Jᵀ (diag p − p pᵀ) J for cross-entropy."""
    total: Tensor | None = None
    for some in x.split(50):
        parts = vmap(jacrev(lambda q, a: functional_call(net, q, (a[None],))[0]), in_dims=(None, 0))(parameters, some)
        jacobian = torch.cat([part.flatten(2) for part in parts.values()], dim=2)
        probabilities = torch.softmax(net(some), dim=1).detach()
        curved = probabilities[:, :, None] * (jacobian - (probabilities[:, :, None] * jacobian).sum(1, keepdim=True))
        part = jacobian.flatten(0, 1).T @ curved.flatten(0, 1)
        total = part if total is None else total + part
    assert total is not None
    return total / len(x)


class Bench:
    """Runs measurements in processes of their own and keeps what came out."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.rows: list[dict[str, Any]] = []

    def python(self, who: str) -> Path:
        """The interpreter of a peer's environment, made if it is not there."""
        return Path(sys.executable) if who == "ours" else python_of(who, self.arguments.venvs)

    def measure(self, who: str, problem: Problem, spec: dict[str, Any]) -> dict[str, Any]:
        """Seconds (the least of the repeats), relative error, and what the runner counted; or why there is nothing."""
        spec_file, out, scores = (self.folder / name for name in ("spec.json", "out.json", "scores.npy"))
        common = {
            "threads": self.arguments.threads,
            "batch": 250,
            "data": str(problem.file),
            "model": problem.name,
            "models": str(HERE / "models.py"),
            "scores": str(scores),
        }
        spec_file.write_text(json.dumps({**spec, **common}))
        if who == "ours":
            command = [str(self.python(who)), "-m", "tests.benchmarks.peers.runner_ours"]
        else:
            command = [str(self.python(who)), str(HERE / f"runner_{who}.py")]
        best: dict[str, Any] = {}
        for _ in range(self.arguments.repeats):
            try:
                done = subprocess.run(
                    [*command, str(spec_file), str(out)],
                    capture_output=True,
                    text=True,
                    timeout=self.arguments.limit,
                    cwd=HERE.parents[2] if who == "ours" else self.folder,
                )
            except subprocess.TimeoutExpired:
                return {"seconds": float(self.arguments.limit), "error": math.nan, "note": "over the limit"}
            if done.returncode:
                return {"seconds": math.nan, "error": math.nan, "note": done.stderr.strip().splitlines()[-1][:80]}
            found = json.loads(out.read_text())
            if not best or found["seconds"] < best["seconds"]:
                best = found
        given = np.load(scores).astype(np.float64)
        exact = problem.exact(spec["matrix"], spec["damping"], spec["method"])
        error = float(np.linalg.norm(given - exact) / np.linalg.norm(exact)) if np.isfinite(given).all() else math.inf
        return {**best, "error": error}

    def compare(self, peer: str, problem: Problem, spec: dict[str, Any], our_method: str | None = None) -> None:
        """A peer's run, and the cheapest of ours that is at least as accurate."""
        theirs = self.measure(peer, problem, spec)
        target = theirs["error"] if math.isfinite(theirs["error"]) and theirs["error"] <= WRONG else 1e-2
        method = our_method or spec["method"]
        ours = self._ours(problem, {**spec, "method": method}, max(target, 2e-5))
        wrong = not theirs["error"] <= WRONG and theirs.get("note") != "over the limit"
        ratio = theirs["seconds"] / ours["seconds"]
        row = {
            "model": problem.name,
            "matrix": spec["matrix"],
            "damping": spec["damping"],
            "method": spec["method"] + ("" if spec.get("rtol") else " (default)" if "cg" in spec["method"] else ""),
            "our_method": method,
            "peer": peer,
            "ours": ours,
            "theirs": theirs,
            "ratio": ratio,
            "wrong": wrong,
        }
        self.rows.append(row)
        note = "WRONG" if wrong else theirs.get("note", "")
        print(
            f"{problem.name:<4} {spec['matrix']:<17}{spec['damping']:<7g}{row['method']:<18}{peer:<11}"
            f"{ours['seconds']:>8.2f} s {ours.get('passes', '-'):>5} {ours['error']:>8.1e}   "
            f"{theirs['seconds']:>8.2f} s {theirs['error']:>8.1e} {ratio:>8.1f}× {note}",
            flush=True,
        )

    def _ours(self, problem: Problem, spec: dict[str, Any], target: float) -> dict[str, Any]:
        if "cg" not in spec["method"] and spec["method"] != "krylov":
            return self.measure("ours", problem, spec)
        found: dict[str, Any] = {}
        low, high = 0, len(LADDER) - 1
        while low <= high:  # errors fall along the ladder
            middle = (low + high) // 2
            tried = self.measure("ours", problem, {**spec, "rtol": LADDER[middle]})
            if tried["error"] <= target:
                found, high = tried, middle - 1
            else:
                low, found = middle + 1, found or tried
        return found

    def summary(self) -> list[str]:
        sound = [row for row in self.rows if not row["wrong"] and math.isfinite(row["ratio"])]

        def mean(rows: list[dict[str, Any]]) -> float:
            return math.exp(sum(math.log(row["ratio"]) for row in rows) / len(rows)) if rows else math.nan

        goals = [
            ("all", sound, 1.5),
            ("pyDVL row CG by default", [r for r in sound if r["method"] == "row cg (default)"], 15.0),
            ("pyDVL direct", [r for r in sound if r["method"] == "direct"], 5.0),
            ("curvlinops CG", [r for r in sound if r["peer"] == "curvlinops"], 2.5),
        ]
        lines = [
            f"{name:<26} geometric mean {mean(rows):>7.1f}× of {len(rows):>2}, least "
            f"{min((r['ratio'] for r in rows), default=math.nan):>6.1f}×, goal {goal:g}×: "
            f"{'PASS' if mean(rows) >= goal else 'MISS'}"
            for name, rows, goal in goals
        ]
        wrong = [row for row in self.rows if row["wrong"]]
        return [*lines, f"{len(wrong)} results of peers are wrong or missing and left out of the means"]


def comparisons(problem: Problem, dampings: list[float]) -> list[tuple[str, dict[str, Any], str | None]]:
    """(peer, what to run, our method if it is another one), for one model."""
    found: list[tuple[str, dict[str, Any], str | None]] = []
    for damping in dampings:
        eye = torch.eye(problem.tests.shape[1], dtype=torch.float64)
        definite = not int(torch.linalg.cholesky_ex(problem.matrices["hessian"] + damping * eye).info)
        for matrix in ("hessian", "empirical_fisher"):
            base = {"matrix": matrix, "damping": damping}
            found.append(("pydvl", {**base, "method": "direct"}, None))
            if matrix == "empirical_fisher" or definite:
                found.append(("pydvl", {**base, "method": "row cg"}, "block cg"))
                found.append(("pydvl", {**base, "method": "block cg", "rtol": 1e-3, "maxiter": 1000}, None))
        fisher = {"matrix": "empirical_fisher", "damping": damping}
        # the largest eigenvalue of G Gᵀ / N, N × N, is that of the Fisher matrix
        gram = problem.gradients @ problem.gradients.T / len(problem.gradients)
        scale = 1.1 * (float(torch.linalg.eigvalsh(gram)[-1]) + damping)
        found.append(("pydvl", {**fisher, "method": "lissa", "scale": 3 * scale, "maxiter": 200}, None))
        found.append(("pydvl", {**fisher, "method": "arnoldi", "rank": 50}, None))
        found.append(("pydvl", {**fisher, "method": "nystroem", "rank": 50}, None))
        found.append(("pydvl", {**fisher, "method": "datainf"}, None))
        for matrix in ("ggn", "hessian"):
            if matrix == "ggn" or definite:
                spec = {"matrix": matrix, "damping": damping, "method": "block cg", "rtol": 1e-3}
                found.append(("curvlinops", spec, None))
    return found


def main() -> None:
    """All comparisons, or those of some models and dampings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn"], choices=["mlp", "cnn"])
    parser.add_argument("--dampings", nargs="+", type=float, default=[1e-1, 1e-2, 1e-3])
    parser.add_argument("--peers", nargs="+", default=RIVALS, choices=RIVALS)
    parser.add_argument("--methods", nargs="+", default=[], help="for instance direct, 'block cg'; all if left out")
    parser.add_argument("--limit", type=int, default=300, help="seconds for one measurement")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--venvs", type=Path, default=FOLDER, help="folder of the peers' environments")
    parser.add_argument("--output", default="", help="a JSON file for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {arguments.threads} threads, torch "
        f"{torch.__version__}, {', '.join(PEERS[peer][0] for peer in RIVALS)}; 64 × 1500, float32"
    )
    print(f"{'':<47}{'':<11}{'ours':>10} {'passes':>5} {'error':>8}   {'peer':>10} {'error':>8} {'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        for name in arguments.models:
            made = problem(name, Path(folder))
            for peer, spec, ours in comparisons(made, arguments.dampings):
                if peer in arguments.peers and spec["method"] in (arguments.methods or [spec["method"]]):
                    bench.compare(peer, made, spec, ours)
        print("\n".join(["", *bench.summary()]))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(bench.rows, indent=1))


if __name__ == "__main__":
    main()
