"""What every trainer is made of: the training data, the network that a seed begins with, the points that are chosen."""

import random
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from distinfluence.errors import RecipeError, SettingError
from distinfluence.evaluate.retraining import Retraining
from distinfluence.model.batch import Batch, batch_length, map_batch
from distinfluence.model.data.door import opened, whole
from distinfluence.model.data.samples import untouched_generators
from distinfluence.scaling.data.recipe import Recipe

Factory = Callable[[], nn.Module] | Recipe | str


class TrainingData:
    """The training data, read once in each process.

    Args:
        data: What `distinfluence.model.data` opens, such as a pair of tensors (x, y); a `Recipe`, or "module:callable",
            of something that returns it. A recipe travels to workers without the data.
    """

    def __init__(self, data: object) -> None:
        self._source = Recipe(data) if isinstance(data, str) else data
        self._batch: Batch | None = None
        if not isinstance(self._source, Recipe):
            opened(self._source, name="data")  # refuses what is not data here rather than on a worker

    def batch(self) -> Batch:
        """Return all samples as one batch."""
        if self._batch is None:
            self._batch = whole(self._source.build() if isinstance(self._source, Recipe) else self._source)
        return self._batch

    def placed(self, dtype: torch.dtype) -> Batch:
        """Return all samples as one batch, with floating-point values of a network's dtype."""
        return map_batch(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, self.batch())

    def retraining(self, indices: ArrayLike, seed: int, weights: ArrayLike | None) -> Retraining:
        """Return the training run of these points, with weights [len(indices)], or 1 where there are none.

        Raises:
            SettingError: If an index is not a training point or comes twice, or there is not one finite weight for
                each.
        """
        return Retraining(_weights(indices, weights, batch_length(self.batch())), seed)

    def __getstate__(self) -> dict[str, object]:
        return {"_source": self._source, "_batch": None}


def _weights(indices: ArrayLike, weights: ArrayLike | None, n: int) -> NDArray[np.float64]:
    chosen = np.asarray(indices)
    given = np.ones(chosen.shape) if weights is None else np.asarray(weights, dtype=np.float64)
    whole_numbers = chosen.ndim == 1 and chosen.dtype.kind in "iu" and len(chosen) > 0
    if not whole_numbers or chosen.min() < 0 or chosen.max() >= n or len(np.unique(chosen)) < len(chosen):
        raise SettingError(
            f"`indices` must be different whole numbers from 0 to {n - 1}, at least one, got {chosen.dtype} "
            f"{list(chosen.shape)}: {chosen.flatten()[:5].tolist()}. Pass the training points to train on, and "
            "`weights` to count points more than once."
        )
    if given.shape != chosen.shape or not np.isfinite(given).all():
        raise SettingError(
            f"`weights` must be one finite number for each of {len(chosen)} indices, got {list(given.shape)} with "
            f"{int((~np.isfinite(given)).sum())} that are not finite."
        )
    found = np.zeros(n)
    found[chosen] = given
    return found


def checked_factory(factory: Factory) -> Factory:
    """Return the factory, a name as a `Recipe`, whose code banks compare. Raises SettingError if it is none."""
    if isinstance(factory, nn.Module) or not (isinstance(factory, Recipe | str) or callable(factory)):
        raise SettingError(
            "`factory` must be a callable that returns a new network, a `Recipe` or 'module:callable', got "
            f"{type(factory).__name__}. Pass for instance `lambda: torch.nn.Linear(64, 10)`."
        )
    return Recipe(factory) if isinstance(factory, str) else factory


def built(factory: Factory, seed: int) -> nn.Module:
    """Return the network that a factory makes when torch, NumPy and Python draw from this seed.

    Raises:
        RecipeError: If it returns something else.
    """
    with untouched_generators():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        module = factory.build() if isinstance(factory, Recipe) else cast(Callable[[], nn.Module], factory)()
    if not isinstance(module, nn.Module):
        raise RecipeError(f"`factory` must return a torch.nn.Module, got {type(module).__name__}.")
    return module


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that training changes, by name.

    Raises:
        SettingError: If there are none, or they differ in dtype.
    """
    found = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    dtypes = {str(p.dtype).removeprefix("torch.") for p in found.values()}
    if len(dtypes) != 1:
        raise SettingError(
            f"`factory` must return a network with trainable parameters of one dtype, got {sorted(dtypes) or 'none'}."
        )
    return found


def fixed(module: nn.Module) -> dict[str, Tensor]:
    """Return what training leaves as it is, by name: buffers, and parameters without gradients."""
    frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
    return {**frozen, **dict(module.named_buffers())}


def views(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters by name as views of flat ones [..., p]; like: name → a tensor of the shape of each."""
    parts = flat.split([tensor.numel() for tensor in like.values()], dim=-1)
    shapes = (tensor.shape for tensor in like.values())
    return {n: part.unflatten(-1, shape) for n, part, shape in zip(like, parts, shapes, strict=True)}


def filled(module: nn.Module, flat: Tensor) -> nn.Module:
    """Return the module itself with these parameters [p] copied into it, in eval mode."""
    with torch.no_grad():
        for name, values in views(flat, trainable(module)).items():
            module.get_parameter(name).copy_(values)
    return module.eval()
