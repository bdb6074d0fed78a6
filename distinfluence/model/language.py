"""Language models: token ids in, logits over the vocabulary at each position out."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from distinfluence.errors import LossError, SettingError, ShapeError
from distinfluence.model.batch import Batch, describe
from distinfluence.model.checks.losses import ClassLabels
from distinfluence.model.objective import Forward, Objective
from distinfluence.model.predictive import Categorical


class LanguageModelObjective(Objective):
    """Cross-entropy of tokens for models of the form ids [n, T] → logits [n, T, V], such as Hugging Face's causal ones.

    A batch is a dict, whose entries except the labels are passed to the model by name, or a pair (ids, labels). The
    model returns the logits or an object with `logits`.

    Args:
        inputs: Name of the ids in a dict.
        labels: Name of the labels [n, T] in a dict. If a dict has no labels, the ids are used.
        shift: Whether position t predicts label t + 1, as in causal models.
        ignore_index: Label of positions that do not count.
        reduction: Whether a sample's loss is the "mean" or the "sum" over its positions that count.

    Raises:
        SettingError: If `reduction` is neither "mean" nor "sum".
    """

    convex = True

    def __init__(
        self,
        inputs: str = "input_ids",
        labels: str = "labels",
        *,
        shift: bool = True,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise SettingError(f"`reduction` must be 'mean' or 'sum', got {reduction!r}. Choose one of these.")
        self.input_name = inputs
        self.label_name = labels
        self.shift = shift
        self.ignore_index = ignore_index
        self.reduction = reduction

    @override
    def settings(self) -> dict[str, object]:
        return super().settings() | dict(vars(self))

    def outputs(self, model: Forward, batch: Batch) -> Tensor:
        """Return the logits of the positions that predict: all but the last if labels are shifted.

        Args:
            model: The model, called with the batch's entries.
            batch: The ids, with or without labels.

        Returns:
            Logits, [n, T, V], or [n, T − 1, V] if labels are shifted.

        Raises:
            LossError: If the model returns anything but logits [n, T, V].
        """
        if isinstance(batch, dict):
            found = model(**{key: value for key, value in batch.items() if key != self.label_name})
        else:
            found = model(batch[0] if isinstance(batch, tuple) else batch)
        logits = getattr(found, "logits", found)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise LossError(
                f"`model` must return logits [n, T, V] or an object with `logits`, got {type(found).__name__}. "
                "Subclass `Objective` to take the predictions out of it."
            )
        return logits[:, :-1] if self.shift else logits

    @override
    def class_labels(self, batch: Batch) -> ClassLabels | None:
        own = batch[-1] if isinstance(batch, tuple) else batch.get(self.label_name) if isinstance(batch, dict) else None
        if not isinstance(own, Tensor) or own.ndim != 2 or own.is_floating_point():
            return None
        return ClassLabels(self._labels(batch), self.label_name, self.ignore_index, axis=2)

    @override
    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        labels = self._labels(batch)
        tokens = torch.nn.functional.cross_entropy(
            outputs.flatten(0, 1), labels.flatten(), ignore_index=self.ignore_index, reduction="none"
        )
        return (tokens.view(labels.shape) * self._weights(labels, outputs)).sum(dim=1)

    def predictive(self, outputs: Tensor, batch: Batch) -> Categorical:
        """Return the softmax at each position.

        Args:
            outputs: Logits, [n, T, V].
            batch: The batch they are of.

        Returns:
            The distribution of the tokens.
        """
        return Categorical(outputs.detach(), self._weights(self._labels(batch), outputs), False, outputs.shape)

    def output_curvature(self, outputs: Tensor, batch: Batch) -> Callable[[Tensor], Tensor]:
        """Return the Hessian of each sample's loss in its logits, in closed form.

        Args:
            outputs: Logits, [n, T, V].
            batch: The batch they are of.

        Returns:
            u [n, T, V] → w (p∘u − p⟨p, u⟩) at each position, with the softmax p and the position's weight w.
        """
        p = torch.softmax(outputs.detach(), dim=2)
        weights = self._weights(self._labels(batch), outputs).unsqueeze(2)
        return lambda u: weights * p * (u - (p * u).sum(dim=2, keepdim=True))

    def _weights(self, labels: Tensor, outputs: Tensor) -> Tensor:
        counted = (labels != self.ignore_index).to(outputs.dtype)
        if self.reduction == "mean":
            counted = counted / counted.sum(dim=1, keepdim=True).clamp_min(1)
        return counted

    def _labels(self, batch: Batch) -> Tensor:
        if isinstance(batch, dict):
            labels = batch.get(self.label_name, batch.get(self.input_name))
        else:
            labels = batch[-1] if isinstance(batch, tuple) else batch
        if not isinstance(labels, Tensor) or labels.ndim != 2:
            raise ShapeError(
                f"`batch` must hold labels [n, T] under {self.label_name!r}, or be a pair (ids, labels), got "
                f"{describe(batch)}. Name them in the objective."
            )
        return labels[:, 1:] if self.shift else labels
