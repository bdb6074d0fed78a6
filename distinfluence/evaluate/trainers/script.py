"""Training by a script in a process of its own, whatever library it uses."""

import contextlib
import hashlib
import importlib.util
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor, nn

from distinfluence.errors import RetrainingError, SettingError
from distinfluence.evaluate.trainers.ingredients import Factory, built, checked_factory
from distinfluence.scaling.data.recipe import assign, read_checkpoint

NEEDED = ("{indices}", "{seed}", "{checkpoint}")
WEIGHTS = "{weights}"
LAST_LINES = 20  # Lines of the script's output that an error shows.
IN_FOLDER = ("model.safetensors", "pytorch_model.bin")  # Names that Hugging Face's `save_pretrained` writes.


class ScriptTrainer:
    """Train by running a script, for instance one that uses Lightning or a Hugging Face `Trainer`.

    These words are replaced wherever they stand in the command:

    - `{indices}`: a file with the training points to train on, ascending, which `numpy.load` reads: int64, [n];
    - `{seed}`: the seed, as digits;
    - `{checkpoint}`: where the script leaves the model's state dict, by `torch.save` or `safetensors.torch.save_file`;
      or a folder as `save_pretrained` writes it;
    - `{weights}`: a file with the weight of each of these points, float64 [n]; needed only for checks that ask for
      weights.

    The script is started without a shell, in this process's environment. It is killed, together with everything that it
    started, when it takes too long or the training is interrupted. Its files are removed afterwards.

    Args:
        command: The program and its arguments; a text is split as a shell would split it.
        factory: Returns the model that the checkpoint belongs to; a `Recipe` or "module:callable" of it.
        timeout: Seconds that a training may take; None for no limit.
        folder: Folder that the script runs in; the current one if None.
        environment: Variables to set for the script, in addition to those of this process.

    Raises:
        SettingError: If the command lacks a word that is replaced, or another argument is out of its range.
    """

    UNCHANGING = ("timeout", "folder")  # attributes that change no model, which no bank compares

    def __init__(
        self,
        command: str | Sequence[str],
        factory: Factory,
        *,
        timeout: float | None = None,
        folder: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
        lacking = [name for name in NEEDED if not any(name in word for word in words)]
        if lacking:
            raise SettingError(
                f"`command` must say where the script finds {', '.join(NEEDED)}, got {shlex.join(words)!r} without "
                f"{', '.join(lacking)}. Pass for instance 'python train.py --indices {{indices}} --seed {{seed}} "
                "--out {checkpoint}'."
            )
        if timeout is not None and not timeout > 0:
            raise SettingError(f"`timeout` must be positive, in seconds, or None, got {timeout}.")
        self.command = tuple(words)
        self.factory = checked_factory(factory)
        self.timeout = timeout
        self.folder = folder
        self.environment = dict(environment or {})
        files = [Path(folder or ".") / word for word in words]
        self.contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]

    def __call__(self, indices: ArrayLike, seed: int, *, weights: ArrayLike | None = None) -> nn.Module:
        """Run the script and read the model that it leaves.

        Args:
            indices: Training points to train on, [n].
            seed: Seed for the script.
            weights: Weight of each of the points, [n]; None for 1.

        Returns:
            The model on the CPU, in eval mode.

        Raises:
            RetrainingError: If the script fails, takes too long or leaves no checkpoint; with its last lines.
            RecipeError: If the checkpoint does not fit the model.
            SettingError: If weights differ from 1 and the command has no `{weights}`.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        given = np.ones(len(chosen)) if weights is None else np.asarray(weights, dtype=np.float64)
        if (given != 1).any() and not any(WEIGHTS in word for word in self.command):
            raise SettingError(
                f"`command` must have {WEIGHTS} for trainings with weights, got {shlex.join(self.command)!r}. Add it, "
                "and let the script multiply the loss of each point with its weight."
            )
        with tempfile.TemporaryDirectory(prefix="distinfluence-training-", ignore_cleanup_errors=True) as name:
            place = Path(name)
            np.save(place / "indices.npy", chosen)
            np.save(place / "weights.npy", given)
            checkpoint = place / "model"
            replaced = {
                "{indices}": str(place / "indices.npy"),
                "{seed}": str(int(seed)),
                "{checkpoint}": str(checkpoint),
                WEIGHTS: str(place / "weights.npy"),
            }
            words = [_replaced(word, replaced) for word in self.command]
            said = self._run(words, place / "output.txt")
            module = built(self.factory, seed)
            assign(module, _tensors(checkpoint, said), "that the script left")
        return module.eval()

    def _run(self, words: list[str], output: Path) -> str:
        """Run the command to its end and return the last lines of what it wrote.

        Raises:
            RetrainingError: If it cannot be started, fails or takes too long.
        """
        with output.open("wb") as sink:
            try:
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    cwd=self.folder,
                    env={**os.environ, **self.environment},
                    start_new_session=True,  # so that all that it starts can be killed with it
                )
            except OSError as error:
                raise RetrainingError(
                    f"`command` {shlex.join(words)} cannot be started: {error}. Correct it, or install the program on "
                    "every worker."
                ) from error
            try:
                status = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                raise RetrainingError(
                    f"`command` {shlex.join(words)} did not end within {self.timeout:g} s and was killed. Raise "
                    f"`timeout`. Its last lines:\n{_last(output)}"
                ) from None
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status != 0:
            raise RetrainingError(
                f"`command` {shlex.join(words)} failed with status {status}. Its last lines:\n{_last(output)}"
            )
        return _last(output)


def _replaced(word: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word


def _last(output: Path) -> str:
    return "\n".join(output.read_text(errors="replace").splitlines()[-LAST_LINES:])


def _tensors(checkpoint: Path, said: str) -> dict[str, Tensor]:
    """Read a checkpoint into memory. said: what the script wrote, for the error where there is none."""
    found = next((checkpoint / name for name in IN_FOLDER if (checkpoint / name).is_file()), checkpoint)
    if not found.is_file():
        raise RetrainingError(
            f"`command` ended without an error but left no file at {{checkpoint}}. Save the state dict there. Its last "
            f"lines:\n{said}"
        )
    with found.open("rb") as file:
        is_torch = file.read(4) == b"PK\x03\x04"  # torch.save writes a zip file
    if not is_torch and importlib.util.find_spec("safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load

        with contextlib.suppress(SafetensorError):  # what torch wrote in its old form is read, or refused, below
            return dict(load(found.read_bytes()))
    return {name: tensor.clone() for name, tensor in read_checkpoint(str(found)).items()}
