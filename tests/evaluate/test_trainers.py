"""Trainers against plain loops, closed forms and other optimizers, all in float64."""

import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor, nn

from distinfluence import DirectInfluence
from distinfluence.errors import (
    RecipeError,
    RetrainingError,
    SettingError,
    UnsupportedModelError,
)
from distinfluence.evaluate import Retraining, ScriptTrainer, SmallNetworks, ToMinimum
from distinfluence.evaluate.bank.identity import trainer_identity
from distinfluence.evaluate.trainers.to_minimum import _Loss
from distinfluence.scaling import Recipe

N, N_CLASSES = 40, 3
EPOCHS, BATCH, RATE, DECAY = 3, 8, 0.05, 1e-3


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 1, 5, 4, generator=generator, dtype=torch.float64)
    return x, (x.flatten(1)[:, :N_CLASSES]).argmax(dim=1)


def tanh_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(20, 7), nn.Tanh(), nn.Linear(7, N_CLASSES)).double()


def normalised_network() -> nn.Module:
    layers = (nn.Flatten(), nn.Linear(20, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, N_CLASSES))
    return nn.Sequential(*layers).double()


def convolutional_network() -> nn.Module:
    layers = (nn.Conv2d(1, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6, N_CLASSES))
    return nn.Sequential(*layers).double()


class Scaled(nn.Module):
    """Has a buffer that differs between networks and a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(20, N_CLASSES)
        self.frozen = nn.Parameter(torch.rand(N_CLASSES), requires_grad=False)
        self.scale: Tensor
        self.register_buffer("scale", torch.rand(20))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.linear(x.flatten(1) * self.scale) * self.frozen
        return outputs


def retraining(size: int, seed: int, weighted: bool = False) -> Retraining:
    generator = np.random.default_rng(100 * seed + size)
    weights = np.zeros(N)
    weights[generator.permutation(N)[:size]] = 1
    return Retraining(weights * generator.uniform(0.5, 2, N) if weighted else weights, seed)


def by_loop(factory: Callable[[], nn.Module], run: Retraining, schedule: str) -> nn.Module:
    """One network, by the rule that `SmallNetworks` documents."""
    x, y = data()
    torch.manual_seed(run.seed)
    model = factory()
    chosen, weights = set(run.indices.tolist()), torch.from_numpy(run.weights)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE, 0.9, weight_decay=DECAY)
    steps = EPOCHS * -(-len(chosen) // BATCH)
    schedulers: dict[str, Callable[[], torch.optim.lr_scheduler.LRScheduler]] = {
        "one_cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
    }
    scheduler = schedulers[schedule]()
    generator = torch.Generator().manual_seed(run.seed)
    for _ in range(EPOCHS):
        order = [j for j in torch.randperm(N, generator=generator).tolist() if j in chosen]
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            losses = nn.functional.cross_entropy(model(x[batch]), y[batch], reduction="none")
            optimizer.zero_grad()
            torch.autograd.backward((weights[batch] * losses).sum() / weights[batch].sum())
            optimizer.step()
            scheduler.step()
    return model


def networks(factory: Callable[[], nn.Module], schedule: str = "one_cycle", **settings: object) -> SmallNetworks:
    return SmallNetworks(
        factory,
        data(),
        nn.CrossEntropyLoss(),
        epochs=EPOCHS,
        batch_size=BATCH,
        learning_rate=RATE,
        weight_decay=DECAY,
        schedule=schedule,
        **settings,
    )


def flat(model: nn.Module) -> NDArray[np.float64]:
    tensors = [*model.parameters(), *model.buffers()]
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors]).numpy()


@pytest.mark.parametrize(
    ("factory", "schedule"),
    [
        (tanh_network, "one_cycle"),
        (normalised_network, "cosine"),
        (convolutional_network, "constant"),
        (lambda: Scaled().double(), "one_cycle"),
    ],
)
def test_networks_trained_at_once_are_those_of_a_loop(factory: Callable[[], nn.Module], schedule: str) -> None:
    # 13 and 16 points make 2 batches, 33 make 5 with one that is almost empty, 5 make less than one
    runs = [retraining(16, 1), retraining(33, 2), retraining(13, 1, True), retraining(16, 3, True), retraining(5, 4)]
    before = torch.get_rng_state()
    with torch.no_grad():
        models = networks(factory, schedule).train_many(runs)
    assert torch.equal(torch.get_rng_state(), before)
    for model, run in zip(models, runs, strict=True):
        assert not model.training
        np.testing.assert_allclose(flat(model), flat(by_loop(factory, run, schedule)), rtol=1e-9, atol=1e-11)


def test_a_network_does_not_depend_on_those_that_are_trained_with_it() -> None:
    runs = [retraining(size, seed) for seed in range(4) for size in (14, 16, 20)]
    together = [flat(model) for model in networks(tanh_network).train_many(runs)]
    by_fives = [flat(model) for model in networks(tanh_network, at_once=5).train_many(runs[::-1])][::-1]
    alone = [flat(networks(tanh_network)(run.indices[::-1], run.seed)) for run in runs]
    np.testing.assert_allclose(by_fives, together, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(alone, together, rtol=1e-11, atol=1e-13)
    assert min(np.abs(a - b).max() for i, a in enumerate(together) for b in together[:i]) > 1e-3


def test_as_many_networks_share_a_program_as_are_trained_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = list[int]()
    train = SmallNetworks._train

    def counted(own: SmallNetworks, group: list[Retraining], steps: int) -> list[nn.Module]:
        sizes.append(len(group))
        return train(own, group, steps)

    monkeypatch.setattr(SmallNetworks, "_train", counted)
    networks(tanh_network, at_once=3).train_many([retraining(size, 0) for size in (16, 9, 33, 15, 14, 40)])
    assert sizes == [3, 1, 2], "16, 9, 15 and 14 points are two batches, 33 and 40 are five"


def test_a_network_that_diverges_is_returned_and_spoils_no_other() -> None:
    x, y = data()
    x[7] = 1e200
    layers = lambda: nn.Sequential(nn.Flatten(), nn.Linear(20, 4), nn.ReLU(), nn.Linear(4, 3)).double()  # noqa: E731
    trainer = SmallNetworks(layers, (x, y), nn.CrossEntropyLoss(), epochs=3, schedule="constant")
    bad, good = trainer.train_many([retraining(40, 0), Retraining((np.arange(N) > 7) * 1.0, 0)])
    assert not np.isfinite(flat(bad)).all()
    assert np.isfinite(flat(good)).all()


def test_trainers_travel_without_the_data_that_a_recipe_makes() -> None:
    run = retraining(16, 1)
    recipe = Recipe("tests.evaluate.test_trainers:data")
    loss = nn.CrossEntropyLoss()
    for trainer in (
        SmallNetworks("tests.evaluate.test_trainers:tanh_network", recipe, loss, epochs=1),
        ToMinimum("tests.evaluate.test_trainers:tanh_network", "tests.evaluate.test_trainers:data", loss, l2=1.0),
    ):
        before = flat(trainer(run.indices, 1))
        sent = cloudpickle.dumps(trainer)
        assert len(sent) < data()[0].nbytes / 2
        np.testing.assert_array_equal(flat(cloudpickle.loads(sent)(run.indices, 1)), before)


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(20)])
def test_layers_that_are_random_or_mix_samples_are_refused(layer: nn.Module) -> None:
    trainer = networks(lambda: nn.Sequential(nn.Flatten(), layer, nn.Linear(20, 3)).double())
    with pytest.raises(UnsupportedModelError, match=f"{type(layer).__name__}.*as one program|as one program.*train"):
        trainer(np.arange(10), 0)


class Branching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)) * (2.0 if float(x.sum()) > 0 else 1.0)


def test_networks_that_vmap_cannot_take_or_that_differ_in_shape_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="as one program"):
        networks(lambda: Branching(20, 3).double())(np.arange(10), 0)
    widths = iter([4, 5])
    odd = networks(lambda: nn.Sequential(nn.Flatten(), nn.Linear(20, next(widths))).double())
    with pytest.raises(UnsupportedModelError, match="different shapes"):
        odd.train_many([retraining(16, 0), retraining(16, 1)])


@pytest.mark.parametrize(
    "settings",
    [{"epochs": 0}, {"batch_size": 0}, {"at_once": 0}, {"momentum": 1.0}, {"learning_rate": float("nan")}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        SmallNetworks(tanh_network, data(), nn.CrossEntropyLoss(), **settings)


def test_other_arguments_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SettingError, match="schedule"):
        networks(tanh_network, "linear")
    with pytest.raises(SettingError, match="factory"):
        networks(tanh_network())
    with pytest.raises(RecipeError, match="factory"):
        networks(dict)([0, 1], 0)
    with pytest.raises(SettingError, match="weights"):
        networks(tanh_network).train_many([Retraining(np.ones(N - 1), 0)])
    with pytest.raises(SettingError, match="none negative"):
        networks(tanh_network)([0, 1], 0, weights=[1.0, -1.0])


@pytest.mark.parametrize("indices", [[0, 0], [N], [-1], [], [0.5], np.ones(N, dtype=bool)])
def test_indices_that_are_no_training_points_are_refused(indices: object) -> None:
    with pytest.raises(SettingError, match="indices"):
        networks(tanh_network)(indices, 0)
    with pytest.raises(SettingError, match="weights"):
        networks(tanh_network)([0, 1], 0, weights=[1.0])


L2 = 0.01


def test_the_minimum_of_ridge_regression_is_the_closed_form() -> None:
    x, _ = data()
    x, y = x.flatten(1), x.flatten(1)[:, :2].sin() + 1
    trainer = ToMinimum(lambda: nn.Linear(20, 2), (x, y), nn.MSELoss(), l2=L2)
    ones = torch.ones(N, 1, dtype=torch.float64)
    design = torch.cat([x, ones], dim=1)
    for run in (retraining(N, 0), retraining(N - 1, 0), retraining(20, 0, True)):
        model = trainer(run.indices, 0, weights=run.weights[run.indices])
        weighted = design.T * torch.from_numpy(run.weights) / N  # of the mean over two outputs: ∇ℓ = (f − y)
        exact = torch.linalg.solve(weighted @ design + L2 * torch.eye(21, dtype=torch.float64), weighted @ y)
        weight, bias = model.parameters()
        found = torch.cat([weight, bias[:, None]], dim=1).T.detach()
        np.testing.assert_allclose(found, exact, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("exact_size", [2000, 10])
def test_the_minimum_of_logistic_regression_is_that_of_scipy(exact_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distinfluence.evaluate.trainers.to_minimum.EXACT_SIZE", exact_size)
    x, y = data()
    factory = lambda: nn.Sequential(nn.Flatten(), nn.Linear(20, N_CLASSES))  # noqa: E731
    trainer = ToMinimum(factory, (x, y), nn.CrossEntropyLoss(), l2=L2)
    for run in (retraining(N - 1, 0), retraining(15, 0, True)):
        weights = torch.from_numpy(run.weights)

        def objective(theta: NDArray[np.float64], weights: Tensor = weights) -> tuple[float, NDArray[np.float64]]:
            t = torch.tensor(theta, requires_grad=True)
            logits = x.flatten(1) @ t[:60].view(3, 20).T + t[60:]
            value = (weights * nn.functional.cross_entropy(logits, y, reduction="none")).sum() / N + L2 / 2 * t @ t
            torch.autograd.backward(value)
            return float(value.detach()), t.grad.numpy()

        model = trainer(run.indices, 0, weights=run.weights[run.indices])
        found = minimize(objective, np.zeros(63), jac=True, method="L-BFGS-B", options={"gtol": 1e-7, "ftol": 0})
        assert next(model.parameters()).dtype == torch.float64
        np.testing.assert_allclose(flat(model), found.x, atol=1e-4)
        assert np.abs(objective(flat(model))[1]).max() < 1e-14


def test_retrainings_begin_at_the_minimum_of_all_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[int]()
    factor = _Loss.factor

    def counted(own: _Loss, theta: Tensor) -> Tensor:
        made.append(1)
        return factor(own, theta)

    monkeypatch.setattr(_Loss, "factor", counted)
    trainer = ToMinimum(linear, data(), nn.CrossEntropyLoss(), l2=L2)
    trainer(np.arange(N), 0)
    first = len(made)
    for j in range(5):
        trainer(np.arange(N), 0, weights=1 + 1e-3 * (np.arange(N) == j))
    assert 1 < first == len(made), "the Hessian of all the data serves all small steps of weights"


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(20, N_CLASSES))


def test_small_steps_of_weights_do_what_influences_say() -> None:
    x, y = data()
    trainer = ToMinimum(linear, (x, y), nn.CrossEntropyLoss(), l2=L2)
    test, step = (x[:3] + 0.1, y[:3]), 1e-4
    exact = DirectInfluence(trainer(np.arange(N), 0), nn.CrossEntropyLoss(), L2).fit((x, y))
    influences = exact.influences(*test, x, y).detach().numpy()

    def losses(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        with torch.no_grad():
            model = trainer(np.arange(N), 0, weights=weights)
            found: NDArray[np.float64] = nn.functional.cross_entropy(model(test[0]), test[1], reduction="none").numpy()
        return found

    for j in range(4):
        one = step * (np.arange(N) == j)
        measured = (losses(1 - one) - losses(1 + one)) / (2 * step) * N
        np.testing.assert_allclose(measured, influences[:, j], atol=1e-6 * np.abs(influences).max())


def test_a_loss_without_a_minimum_is_named() -> None:
    with pytest.raises(RetrainingError, match="found no minimum.*l2"):
        ToMinimum(linear, data(), nn.CrossEntropyLoss(), l2=0.0, maxiter=5)(np.arange(N), 0)
    with pytest.raises(SettingError, match="l2"):
        ToMinimum(linear, data(), nn.CrossEntropyLoss(), l2=-1.0)


SCRIPT = """
import os, subprocess, sys, time
mode, indices, seed, weights, out = sys.argv[1:]
print("training", "{}", os.environ["HOW"], flush=True)
if mode == "fails":
    sys.exit("no such luck")
if mode == "hangs":
    child = subprocess.Popen(["sleep", "600"])
    open("child", "w").write(str(child.pid))
    time.sleep(600)
if mode == "nothing":
    sys.exit(0)
import numpy as np, torch
chosen, weights = np.load(indices), np.load(weights)
state = {"weight": torch.tensor([[chosen.sum(), int(seed)]]).float(), "bias": torch.tensor([weights.sum()]).float()}
if mode == "torch":
    torch.save(state, out)
elif mode == "code":
    torch.save({"weight": torch.nn.Linear(2, 1)}, out)
elif mode == "folder":
    os.mkdir(out)
    torch.save(state, out + "/pytorch_model.bin")
elif mode == "safetensors":
    from safetensors.torch import save_file
    save_file(state, out)
"""


def script(folder: Path, mode: str, timeout: float | None = None) -> ScriptTrainer:
    (folder / "train.py").write_text(textwrap.dedent(SCRIPT))
    words = [sys.executable, "train.py", mode, "{indices}", "{seed}", "{weights}", "{checkpoint}"]
    settings = {"folder": str(folder), "environment": {"HOW": "slowly", "TMPDIR": str(folder)}}
    return ScriptTrainer(words, lambda: nn.Linear(2, 1), timeout=timeout, **settings)


@pytest.mark.parametrize("mode", ["torch", "folder", "safetensors"])
def test_a_script_trains_on_what_it_is_given(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode == "safetensors":
        pytest.importorskip("safetensors")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = cloudpickle.loads(cloudpickle.dumps(script(tmp_path, mode)))([2, 5], 7, weights=[0.5, 0.25])
    assert [p.flatten().tolist() for p in model.parameters()] == [[7.0, 7.0], [0.75]]
    assert not model.training
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.py"]


@pytest.mark.parametrize(
    ("mode", "error", "message"),
    [
        ("fails", RetrainingError, r"status 1(.|\n)*training \{\} slowly\nno such luck"),
        ("nothing", RetrainingError, "left no file"),
        ("code", RecipeError, "more than tensors"),
    ],
)
def test_a_script_that_fails_is_named_with_its_last_lines(
    mode: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        script(tmp_path, mode)([2, 5], 7)


def ends(child: int) -> bool:
    """Whether a process that was killed is gone, or a zombie, within ten seconds."""
    status = Path(f"/proc/{child}/stat")
    for _ in range(1000):
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_script_that_takes_too_long_or_is_interrupted_is_killed_with_what_it_started(
    interrupted: bool, tmp_path: Path
) -> None:
    def interrupt() -> None:
        while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    if interrupted:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            script(tmp_path, "hangs", timeout=60)([0], 0)
    else:
        with pytest.raises(RetrainingError, match=r"within 3 s(.|\n)*training"):
            script(tmp_path, "hangs", timeout=3)([0], 0)
    assert ends(int((tmp_path / "child").read_text()))


def test_commands_that_lack_a_word_are_refused() -> None:
    with pytest.raises(SettingError, match=r"without \{seed\}, \{checkpoint\}"):
        ScriptTrainer("python train.py --indices={indices}", linear)
    with pytest.raises(SettingError, match="timeout"):
        ScriptTrainer("true {indices} {seed} {checkpoint}", linear, timeout=0)
    with pytest.raises(SettingError, match=r"\{weights\}"):
        ScriptTrainer("true {indices} {seed} {checkpoint}", linear)([0], 0, weights=[2.0])
    with pytest.raises(RetrainingError, match="cannot be started"):
        ScriptTrainer(f"{os.sep}no/such/program {{indices}} {{seed}} {{checkpoint}}", linear)([0], 0)


def test_a_bank_sees_what_a_trainer_is_made_of_and_not_how_long_it_may_take(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print(1)")
    command = "python train.py {indices} {seed} {checkpoint}"

    def script(**settings: Any) -> dict[str, str]:
        return trainer_identity(ScriptTrainer(command, "torch.nn:Identity", folder=str(tmp_path), **settings))

    before = script()
    assert script(timeout=5.0) == before
    assert script(environment={"A": "1"}) != before
    (tmp_path / "train.py").write_text("print(2)")
    assert script() != before
    data = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)

    def small(**settings: Any) -> dict[str, str]:
        return trainer_identity(SmallNetworks("torch.nn:Identity", data, nn.CrossEntropyLoss(), **settings))

    assert small(at_once=3) == small()
    assert small(epochs=3) != small()
