"""How models and data sets travel: as a reference and a checkpoint, never as tensors in a task.

A `Recipe` names a callable that a worker can import. A `ModelRecipe` adds a checkpoint and the sha256 of its tensors,
which is checked where the model is built. A model that is only in memory is spilled first: its tensors to a checkpoint
file, its structure (without tensors) to a pickle that goes with the tasks, not to disk. Checkpoints are read with
`weights_only=True` and memory-mapped, so that processes of one host share the pages.
"""

import copy
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import cloudpickle
import numpy as np
import torch
from torch import Tensor, nn

from distinfluence.atomic import appearing
from distinfluence.errors import RecipeError
from distinfluence.influence.arrays import Array
from distinfluence.scaling.scratch import scratch_errors
from distinfluence.store.format.fingerprint import fingerprint_arrays

STRUCTURE_BYTES = 16 * 2**20  # a module without its tensors that is larger than this carries data it should not


@dataclass(frozen=True)
class Recipe:
    """Something that a worker builds for itself: `module:callable` called with `arguments`.

    Args:
        target: The callable, as `module:name`.
        arguments: Its keyword arguments.
        folder: Where to import the module from, in addition to the Python path: a folder that workers see, too.

    >>> Recipe("collections:Counter", {"a": 2}).build()
    Counter({'a': 2})
    """

    target: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    folder: str | None = None

    def resolve(self) -> object:
        """Import what `target` names.

        Returns:
            The object itself, not called.

        Raises:
            RecipeError: If `target` is not `module:name`, or it cannot be imported.
        """
        module_name, colon, attribute = self.target.partition(":")
        if not colon or not module_name or not attribute:
            raise RecipeError(
                f"`{self.target}` must name something as `module:name`, for instance `my_package.models:build`."
            )
        if self.folder is not None and self.folder not in sys.path:
            sys.path.insert(0, self.folder)
        try:
            found: object = importlib.import_module(module_name)
        except ImportError as error:
            raise RecipeError(
                f"`{self.target}`: cannot import {module_name!r} ({error}). Install it where the workers run, or put "
                "the file next to the job file."
            ) from error
        for name in attribute.split("."):
            if not hasattr(found, name):
                raise RecipeError(f"`{self.target}`: {module_name!r} has no {attribute!r}. Correct the name.")
            found = getattr(found, name)
        return found

    def build(self) -> object:
        """Call what `target` names.

        Returns:
            What the callable returns.

        Raises:
            RecipeError: If it cannot be imported, or cannot be called with these arguments.
        """
        target = self.resolve()
        if not callable(target):
            raise RecipeError(f"`{self.target}` must be callable, got {type(target).__name__}. Name a function.")
        try:
            return target(**self.arguments)
        except TypeError as error:
            raise RecipeError(
                f"`{self.target}` cannot be called with {dict(self.arguments)}: {error}. Correct the arguments."
            ) from error


@dataclass(frozen=True)
class ModelRecipe:
    """A model as a factory and a checkpoint.

    Args:
        factory: A `Recipe` that returns the module, or the pickled structure of a spilled model.
        checkpoint: A file of tensors as `torch.save(model.state_dict(), …)` writes it. The factory's own weights are
            kept if None.
        sha256: Fingerprint of the model's tensors, which is checked where the model is built; empty for no check.
    """

    factory: Recipe | bytes
    checkpoint: str | None = None
    sha256: str = ""

    def build(self) -> nn.Module:
        """Build the module.

        Returns:
            The module with its weights, in the mode that the factory leaves it in.

        Raises:
            RecipeError: If the factory returns no module, the checkpoint does not fit, or the tensors have another
                fingerprint.
        """
        module = cloudpickle.loads(self.factory) if isinstance(self.factory, bytes) else self.factory.build()
        if not isinstance(module, nn.Module):
            raise RecipeError(
                f"`model` must be built by a callable that returns a Module, got {type(module).__name__}."
            )
        if self.checkpoint is not None:
            assign(module, read_checkpoint(self.checkpoint), self.checkpoint)
        if self.sha256 and fingerprint_module(module) != self.sha256:
            raise RecipeError(
                f"`model` built from {self.checkpoint or self.factory!r} has other tensors than the run began with. "
                "Restore the checkpoint, or begin a new run."
            )
        return module

    @classmethod
    def spill(cls, module: nn.Module, folder: Path) -> "ModelRecipe":
        """Make the recipe of a module that is only in memory.

        Args:
            module: The module.
            folder: Folder for a file with its tensors, seen by every worker.

        Returns:
            The recipe.

        Raises:
            RecipeError: If the module's structure cannot be pickled, or carries data next to parameters and buffers.
            StoreError: If the disk is full.
        """
        sha256 = fingerprint_module(module)
        checkpoint = folder / f"model-{sha256[:16]}.pt"
        if not checkpoint.is_file():  # workers may have it mapped
            with scratch_errors(folder, f"the model to {checkpoint.name}"), appearing(checkpoint) as partial:
                torch.save(tensors_of(module), partial)
        return cls(_structure(module), str(checkpoint), sha256)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name, non-persistent buffers too; tied ones under each of their names."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}


def fingerprint_module(module: nn.Module) -> str:
    """Return the sha256 of the module's parameters and buffers, by name, dtype, shape and value."""
    return fingerprint_arrays({name: _bits(tensor) for name, tensor in tensors_of(module).items()})


def _bits(tensor: Tensor) -> Array:
    tensor = (tensor if tensor.layout is torch.strided else tensor.to_dense()).cpu().contiguous()
    array: Array = (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return np.asarray(array)


def read_checkpoint(path: str) -> dict[str, Tensor]:
    """Read name → tensor from a checkpoint, memory-mapped.

    Raises:
        RecipeError: The file is missing, or holds anything but tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise RecipeError(f"`checkpoint` {path} cannot be read: {error}. Pass a file written by torch.save.") from error
    except Exception as error:  # weights_only refuses with pickle.UnpicklingError
        raise RecipeError(
            f"`checkpoint` {path} holds more than tensors: {error}. Save `model.state_dict()` alone."
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise RecipeError(
            f"`checkpoint` {path} must hold a mapping name → tensor, got {type(content).__name__} with other values. "
            "Save `model.state_dict()` alone."
        )
    return {str(name): tensor for name, tensor in content.items()}


def assign(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put tensors in place of the module's parameters and buffers without a copy; tied ones stay tied.

    Buffers that are missing keep their value unless they have none; everything else must fit exactly.

    Raises:
        RecipeError: The tensors do not fit; the message names what is missing, unknown or of another shape.
    """
    own = tensors_of(module)
    optional = {name for name, tensor in own.items() if not tensor.is_meta and not _is_parameter(module, name)}
    unknown = sorted(set(tensors) - set(own))
    missing = sorted(set(own) - set(tensors) - optional)
    missing = [name for name in missing if not _twin(module, name, tensors)]
    misshaped = [
        f"{name}: {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
        for name, tensor in tensors.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if unknown or missing or misshaped:
        raise RecipeError(
            f"`checkpoint` {source} does not fit the model: missing {missing[:5]}, unknown {unknown[:5]}, shapes "
            f"{misshaped[:5]}. Pass the checkpoint of this architecture."
        )
    placed: dict[int, nn.Parameter | Tensor] = {}
    for name, tensor in tensors.items():
        owner, attribute = _owner(module, name)
        old = getattr(owner, attribute)
        if id(old) not in placed:
            placed[id(old)] = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    _replace_everywhere(module, placed)


def _replace_everywhere(module: nn.Module, placed: Mapping[int, nn.Parameter | Tensor]) -> None:
    for child in module.modules():
        for store in (child._parameters, child._buffers):
            for attribute, old in list(store.items()):
                if old is not None and id(old) in placed:
                    store[attribute] = placed[id(old)]  # type: ignore[assignment]
        if isinstance(child, nn.RNNBase):
            child._init_flat_weights()  # RNNs keep a list of their weights next to the registered ones


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute


def _is_parameter(module: nn.Module, name: str) -> bool:
    owner, attribute = _owner(module, name)
    return attribute in owner._parameters


def _twin(module: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Say whether the tensor of that name is there under another name that it is tied to."""
    owner, attribute = _owner(module, name)
    mine = getattr(owner, attribute)
    for other in tensors:
        path, _, last = other.rpartition(".")
        try:
            if getattr(module.get_submodule(path), last, None) is mine:
                return True
        except AttributeError:
            continue
    return False


def _structure(module: nn.Module) -> bytes:
    hollow: dict[int, object] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        hollow[id(tensor)] = (
            nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty.detach()
        )
    try:
        structure = cloudpickle.dumps(copy.deepcopy(module, hollow))
    except Exception as error:
        raise RecipeError(
            f"`model` cannot be sent to workers: {error}. Pass a `ModelRecipe` with a factory that builds it there."
        ) from error
    if len(structure) > STRUCTURE_BYTES:
        raise RecipeError(
            f"`model` carries {len(structure) / 2**20:.0f} MiB besides its parameters and buffers. Register these "
            "tensors as buffers, or pass a `ModelRecipe`."
        )
    return bytes(structure)
