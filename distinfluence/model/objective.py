"""What is differentiated: the training loss of a sample and, where it differs, the measurement of a query.

`SupervisedObjective` makes one from any loss of (outputs, targets) as torch has them. Subclass `Objective` for batches
of another form (dicts as Hugging Face models take them) or to ask another question of the query than its loss.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from distinfluence.errors import DistinfluenceError, LossError, ShapeError
from distinfluence.model.batch import Batch, describe
from distinfluence.model.checks.losses import (
    ClassLabels,
    check_aligned,
    check_returned,
    innermost,
    is_one_of,
    parts,
    reduction_remarks,
    setting,
)
from distinfluence.model.checks.raised import of_loss, squeeze
from distinfluence.model.identity.structure import identity
from distinfluence.model.predictive import Categorical, Dense, Independent, Predictive

FEW_OUTPUTS = 64  # of a sample, for which the loss's Hessian is made whole where it has no closed form

Loss = Callable[[Tensor, Tensor], Tensor]

# their `weight` scales the terms of a plain mean; that of cross-entropy also divides it by the weights of the batch
PLAIN_WEIGHTS = (nn.BCELoss, nn.BCEWithLogitsLoss, nn.MultiMarginLoss, nn.MultiLabelSoftMarginLoss)


# convex in the outputs for every target and every setting
CONVEX_MODULES = (
    nn.BCEWithLogitsLoss,
    nn.CrossEntropyLoss,
    nn.HuberLoss,
    nn.L1Loss,
    nn.MSELoss,
    nn.NLLLoss,
    nn.SmoothL1Loss,
    nn.SoftMarginLoss,
)
CONVEX_FUNCTIONS = (
    nn.functional.binary_cross_entropy_with_logits,
    nn.functional.cross_entropy,
    nn.functional.huber_loss,
    nn.functional.l1_loss,
    nn.functional.mse_loss,
    nn.functional.nll_loss,
    nn.functional.smooth_l1_loss,
    nn.functional.soft_margin_loss,
)


WEIGHTED_FUNCTIONS = (nn.functional.cross_entropy, nn.functional.nll_loss)  # as `nn.CrossEntropyLoss`, with weights


class Forward(Protocol):
    """The model as an objective sees it: called as the module is, with the parameters at hand."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns."""


class Objective(ABC):
    """Per-sample training loss, and the measurement of a query; both [n] for a batch of n samples.

    A sample's value must not depend on the other samples of the batch. This is checked on samples from the whole data.

    Attributes:
        convex: Whether a sample's loss is certain to be convex in its outputs. The Gauss–Newton matrix is then positive
            semi-definite, and error bounds on its solutions are rigorous.
    """

    convex: bool = False

    @abstractmethod
    def outputs(self, model: Forward, batch: Batch) -> Tensor:
        """Return the model's predictions. The Gauss–Newton matrix is split here into model and loss.

        Args:
            model: The model, called as the module is.
            batch: The n samples.

        Returns:
            Predictions, [n, ...].

        Raises:
            LossError: If the model returns something else than the objective expects.
            ShapeError: If the batch has another form than the objective expects.
        """

    @abstractmethod
    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the training loss of each sample. The training objective is their mean.

        Args:
            outputs: What `outputs` returned for the batch, [n, ...].
            batch: The n samples.

        Returns:
            Losses, [n].
        """

    def measurements(self, model: Forward, batch: Batch) -> Tensor:
        """Return what is asked of each query sample: its training loss unless overridden.

        Args:
            model: The model, called as the module is.
            batch: The n query samples.

        Returns:
            Measurements, [n].
        """
        return self.losses(self.outputs(model, batch), batch)

    def inputs(self, batch: Batch) -> Tensor:
        """Return the tensor that perturbation mode differentiates by: the first of an (x, y) batch.

        Args:
            batch: The n samples.

        Returns:
            The inputs, [n, *input].

        Raises:
            ShapeError: If the batch is not an (x, y) pair. Override the method for other batches.
        """
        if isinstance(batch, tuple) and isinstance(batch[0], Tensor):
            return batch[0]
        raise ShapeError(
            "`mode='perturbation'` needs to know which tensor of the batch is perturbed, and this batch is no (x, y) "
            f"pair: {describe(batch)}. Override `inputs` and `replace_inputs` of the objective."
        )

    def replace_inputs(self, batch: Batch, inputs: Tensor) -> Batch:
        """Return the same batch with other inputs.

        Args:
            batch: The n samples.
            inputs: The tensor to put in place of what the method `inputs` returns, [n, *input].

        Returns:
            The new batch.
        """
        assert isinstance(batch, tuple)
        return (inputs, *batch[1:])

    def class_labels(self, batch: Batch) -> ClassLabels | None:
        """Return the class labels of a batch, which are compared with the number of outputs before the loss sees them.

        Args:
            batch: The n samples.

        Returns:
            The labels; None, the default, for losses that take other targets.
        """
        return None

    def output_curvature(self, outputs: Tensor, batch: Batch) -> Callable[[Tensor], Tensor] | None:
        """Return the Hessian of each sample's loss in its outputs, in closed form.

        Args:
            outputs: What `outputs` returned for the batch, [n, ...].
            batch: The n samples.

        Returns:
            u [n, ...] → ∇²_f ℓ(f)·u of each sample, which is compared with the derivative on first use. None, the
            default, to have the loss differentiated.
        """
        return None

    def predictive(self, outputs: Tensor, batch: Batch) -> Predictive | None:
        """Return the distribution of targets whose negative logarithm is the loss.

        Unless overridden, it is made from the loss's Hessian, if the loss is convex in FEW_OUTPUTS outputs or fewer.

        Args:
            outputs: What `outputs` returned for the batch, [n, ...].
            batch: The n samples.

        Returns:
            The distribution at these outputs; None where it is not known.
        """
        if not self.convex or outputs[0].numel() > FEW_OUTPUTS:
            return None
        m = outputs[0].numel()
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.losses(leaf, batch).sum(), leaf, create_graph=True)
            flat = slope.flatten(1)
            rows = [
                torch.autograd.grad(flat[:, i].sum(), leaf, retain_graph=True, materialize_grads=True)[0].flatten(1)
                if flat.requires_grad
                else torch.zeros_like(flat)
                for i in range(m)
            ]
        hessians = torch.stack(rows, dim=1).detach()
        return Dense.of((hessians + hessians.transpose(1, 2)) / 2, outputs.shape)

    def settings(self) -> dict[str, object]:
        """Return what fixes the objective, for provenance and fingerprints.

        Returns:
            Values of JSON's types: unless overridden, the objective's name, the code of its class and its attributes
            (see `model.identity.structure`).
        """
        return {"objective": f"{type(self).__module__}.{type(self).__qualname__}"} | _details(self)

    def check(self, outputs: Tensor, batch: Batch) -> tuple[str, ...]:
        """Check that the loss can be understood, on a batch of the training data.

        Args:
            outputs: What `outputs` returned for the batch, [n, ...].
            batch: The n samples.

        Returns:
            Remarks on how the loss was understood, for the fit report.

        Raises:
            LossError: If the loss cannot be understood, for instance as neither a mean nor a sum over the batch.
            ShapeError: If the outputs do not have one row for each sample.
            DtypeError: If the loss cannot take these outputs and targets.
        """
        return ()


class SupervisedObjective(Objective):
    """Batches (x, y) and a loss of (outputs, targets).

    The per-sample loss is the loss of a batch of one, so that mean and sum over the batch give the same result. A
    module with `reduction="none"` is called on the whole batch and must return [n]. `check` finds out whether the loss
    is a mean or a sum over the batch, and whether vmap can take it. `settings` are the loss's name, settings and
    tensors; for a loss of your own, also its code and what it captured.

    The Hessian in the outputs has a closed form for cross-entropy over classes, p∘u − p⟨p, u⟩, and for the mean squared
    error of d outputs, 2u/d. The predictive distribution is the softmax at each position for cross-entropy, a normal
    distribution for the mean squared error, and independent Bernoulli variables for binary cross-entropy of logits.

    Args:
        loss: A callable of (outputs, targets), such as a torch loss or a `functools.partial` of one.

    Raises:
        LossError: If `loss` is a class or not callable, or divides by the class weights of the batch.
    """

    def __init__(self, loss: Loss) -> None:
        if not callable(loss):
            raise LossError(
                f"`loss` must be a callable of (outputs, targets) or an `Objective`, got {type(loss).__name__}. "
                "Pass for instance `torch.nn.CrossEntropyLoss()`."
            )
        if isinstance(loss, type):
            raise LossError(f"`loss` must be an instance, got the class {loss.__name__}. Pass `{loss.__name__}()`.")
        self.loss = loss
        self.convex = is_one_of(loss, (*CONVEX_MODULES, *CONVEX_FUNCTIONS))
        self._vmap = True
        self._unreduced = setting(loss, "reduction") == "none"
        named = innermost(loss)
        weighted = setting(loss, "weight") is not None and not isinstance(loss, PLAIN_WEIGHTS)
        usual = "mean" if named in WEIGHTED_FUNCTIONS else None
        if weighted and setting(loss, "reduction", usual) == "mean":
            raise LossError(
                f"`loss` is {getattr(named, '__name__', type(loss).__name__)} with class weights and reduction 'mean', "
                "which divides by the weights of the batch: a sample's loss then depends on the others. Use "
                "reduction='none' or 'sum'."
            )

    @override
    def settings(self) -> dict[str, object]:
        own = {} if type(self) is SupervisedObjective else {"class": identity(type(self))}
        if isinstance(self.loss, functools.partial):
            inner = SupervisedObjective(self.loss.func).settings()
            return {**inner, "args": identity(self.loss.args), **own} | {
                key: identity(value) for key, value in self.loss.keywords.items()
            }
        named = self.loss if hasattr(self.loss, "__qualname__") else type(self.loss)
        return {"loss": f"{named.__module__}.{named.__qualname__}", **own} | _details(self.loss)

    @override
    def outputs(self, model: Forward, batch: Batch) -> Tensor:
        x, _ = _pair(batch)
        outputs = model(x)
        if not isinstance(outputs, Tensor):
            raise LossError(
                f"`model` must return one tensor for a loss of (outputs, targets), got {parts(outputs)}. Subclass "
                "`Objective` and take the predictions out of it in `outputs`."
            )
        return outputs

    @override
    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        _, y = _pair(batch)
        if self._unreduced:
            return self._whole(outputs, y)
        if y.shape[0] == 1:
            return self._one(outputs, y).unsqueeze(0)
        if self._vmap:
            try:
                result: Tensor = torch.vmap(lambda f, t: self._one(f.unsqueeze(0), t.unsqueeze(0)))(outputs, y)
                return result
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                pass  # a loss that vmap cannot take, in a process where `check` has not found it out
        return self._one_by_one(outputs, y)

    @override
    def class_labels(self, batch: Batch) -> ClassLabels | None:
        y = batch[1] if isinstance(batch, tuple) and len(batch) == 2 else None
        return ClassLabels.of(self.loss, y) if isinstance(y, Tensor) else None

    @override
    def output_curvature(self, outputs: Tensor, batch: Batch) -> Callable[[Tensor], Tensor] | None:
        _, y = _pair(batch)
        if type(self.loss) is nn.CrossEntropyLoss and self.loss.weight is None and outputs.ndim == 2 and y.ndim == 1:
            probabilities = torch.softmax(outputs.detach(), dim=1) * (y != self.loss.ignore_index).unsqueeze(1)
            return lambda u: probabilities * (u - (probabilities * u).sum(dim=1, keepdim=True))
        if type(self.loss) is nn.MSELoss and outputs.shape == y.shape and not self._unreduced:
            scale = 2.0 / outputs[0].numel() if self.loss.reduction == "mean" else 2.0
            return lambda u: scale * u
        return None

    @override
    def predictive(self, outputs: Tensor, batch: Batch) -> Predictive | None:
        _, y = _pair(batch)
        classes = type(self.loss) is nn.CrossEntropyLoss or self.loss is nn.functional.cross_entropy
        if classes and getattr(self.loss, "weight", None) is None and outputs.ndim >= 2:
            return self._categorical(outputs, y)
        squared = type(self.loss) is nn.MSELoss or self.loss is nn.functional.mse_loss
        if squared and outputs.shape == y.shape and not self._unreduced:
            scale = 2.0 / outputs[0].numel() if getattr(self.loss, "reduction", "mean") == "mean" else 2.0
            return Independent(torch.full_like(outputs.detach(), scale))
        if type(self.loss) is nn.BCEWithLogitsLoss and self.loss.weight is None and self.loss.pos_weight is None:
            p = torch.sigmoid(outputs.detach())
            scale = 1.0 / outputs[0].numel() if self.loss.reduction == "mean" else 1.0
            return Independent(p * (1 - p) * scale)
        return super().predictive(outputs, batch)

    def _categorical(self, outputs: Tensor, y: Tensor) -> Categorical:
        logits = outputs.movedim(1, -1).reshape(outputs.shape[0], -1, outputs.shape[1])
        ignored = getattr(self.loss, "ignore_index", -100)
        counted = torch.ones_like(logits[..., 0])
        if not y.is_floating_point():
            counted = (y.reshape(y.shape[0], -1) != ignored).to(logits.dtype)
        if getattr(self.loss, "reduction", "mean") == "mean":
            counted = counted / counted.sum(dim=1, keepdim=True).clamp_min(1)
        return Categorical(logits, counted, True, outputs.shape)

    @override
    def check(self, outputs: Tensor, batch: Batch) -> tuple[str, ...]:
        _, y = _pair(batch)
        if outputs.shape[:1] != y.shape[:1]:
            raise ShapeError(
                f"`model` must return one row for each target, got outputs {tuple(outputs.shape)} for targets "
                f"{tuple(y.shape)}. Return the samples along the first dimension."
            )
        check_aligned(self.loss, outputs, y)
        whole = self._call(outputs, y)
        if self._unreduced:
            return ()
        one_by_one = self._one_by_one(outputs, y)
        self._vmap = torch.allclose(self.losses(outputs, batch), one_by_one)
        return reduction_remarks(float(whole), one_by_one.double(), squeeze(outputs, y))

    def _call(self, outputs: Tensor, y: Tensor) -> Tensor:
        try:
            value = self.loss(outputs, y.clone())
        except (DistinfluenceError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise of_loss(error, outputs, y) from error
        returned = check_returned(value, "loss")
        if returned.numel() != 1 and not self._unreduced:
            raise LossError(
                f"`loss` must return one number for a batch, its mean or its sum, got shape {tuple(returned.shape)}. "
                "Return its mean, or subclass `Objective` and return one loss per sample."
            )
        return returned

    def _one_by_one(self, outputs: Tensor, y: Tensor) -> Tensor:
        return torch.stack([self._one(outputs[i : i + 1], y[i : i + 1]) for i in range(y.shape[0])])

    def _one(self, outputs: Tensor, y: Tensor) -> Tensor:
        # a loss may work in place; the targets are the user's
        value = check_returned(self.loss(outputs, y.clone()), "loss")
        if value.numel() != 1:
            raise LossError(
                f"`loss` must return one number for a batch of one, got shape {tuple(value.shape)}. "
                "Reduce all dimensions but the samples."
            )
        return value.reshape(())

    def _whole(self, outputs: Tensor, y: Tensor) -> Tensor:
        values = check_returned(self.loss(outputs, y.clone()), "loss")
        if values.shape != y.shape[:1]:
            raise LossError(
                f"`loss` with reduction='none' must return one value per sample, [{y.shape[0]}], got "
                f"{tuple(values.shape)}. Use reduction='mean', or reduce all dimensions but the first."
            )
        return values


def as_objective(loss: Loss | Objective) -> Objective:
    """Return the objective itself, or make one from a loss of (outputs, targets)."""
    return loss if isinstance(loss, Objective) else SupervisedObjective(loss)


def _details(of: object) -> dict[str, object]:
    """Its identity next to the name."""
    found = identity(of)
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if key != "class" or isinstance(value, dict)}


def _pair(batch: Batch) -> tuple[Tensor, Tensor]:
    if isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], Tensor) and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise ShapeError(
        f"`batch` must be a pair (x, y) for a loss of (outputs, targets), got {describe(batch)}. "
        "Subclass `Objective` for batches of another form."
    )
