"""The damping λ: a number, one for each block, or a rule relative to the spectrum of the block's curvature."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeGuard

from distinfluence.curvature import CurvatureOperator
from distinfluence.curvature.base import SupportsEigenbasis, SupportsSampleGradients
from distinfluence.errors import SettingError
from distinfluence.model.blocks import ParameterBlocks
from distinfluence.solvers.base import hold_plain, plain
from distinfluence.solvers.spectrum import extreme_eigenvalues, mean_eigenvalue

NAME = "hessian_regularization"


@dataclass(frozen=True)
class RelativeDamping:
    """λ = fraction × an eigenvalue of the block's curvature, found when the model is fitted.

    A tenth of the mean is the usual heuristic, and carries over between models. An indefinite matrix may have a mean
    that is not positive, which is refused.

    Args:
        fraction: A finite number above 0.
        of: "mean", the trace over the number of parameters by Hutchinson's estimate (one pass; exact for the empirical
            Fisher and Kronecker-factored matrices), or "largest", by Lanczos (5 to 20 passes).

    Raises:
        SettingError: If the fraction is not a finite number above 0, or `of` is another word.

    >>> RelativeDamping()
    RelativeDamping(fraction=0.1, of='mean')
    """

    fraction: float = 0.1
    of: Literal["mean", "largest"] = "mean"

    def __post_init__(self) -> None:
        hold_plain(self)
        if not _is_number(self.fraction) or self.fraction <= 0:
            raise SettingError(f"`fraction` must be a finite number > 0, got {self.fraction!r}. Pass for instance 0.1.")
        if self.of not in ("mean", "largest"):
            raise SettingError(f"`of` must be 'mean' or 'largest', got {self.of!r}. Choose one of these.")

    def resolve(self, operator: CurvatureOperator, block: str) -> float:
        """Return λ for the curvature of a block.

        Args:
            operator: The curvature A of the block.
            block: The name of the block, for errors.

        Returns:
            The damping λ.

        Raises:
            SettingError: If the eigenvalue is not positive.
        """
        if isinstance(operator, SupportsEigenbasis):
            eigenvalues = operator.eigenvalues()
            value = float(eigenvalues.max() if self.of == "largest" else eigenvalues.mean())
        elif self.of == "largest":
            value = extreme_eigenvalues(operator).largest
        elif isinstance(operator, SupportsSampleGradients):
            value = operator.mean_square_gradient() / operator.size
        else:
            value = mean_eigenvalue(operator)
        if not 0 < value < math.inf:
            raise SettingError(
                f"`{NAME}` {self} needs a positive {self.of} eigenvalue, got {value:.3g} for block {block!r}. Pass a "
                "number, or take second_order_mode='ggn'."
            )
        return self.fraction * value


Regularization = float | RelativeDamping | Mapping[str, float | RelativeDamping]


def damping_by_block(blocks: ParameterBlocks, values: Regularization) -> dict[str, float | RelativeDamping]:
    """One number or rule for each block. Raises SettingError for a missing or unknown block, or anything else."""
    by_block: dict[str, float | RelativeDamping] = {k: plain(v) for k, v in blocks.spread(values, NAME).items()}
    for name, value in by_block.items():
        if not isinstance(value, RelativeDamping) and not (_is_number(value) and value >= 0):
            raise SettingError(
                f"`{NAME}` must be a finite number ≥ 0 or a `RelativeDamping`, got {value!r} for block {name!r}. "
                "Pass the damping λ that is added to the curvature's diagonal."
            )
    return {name: value if isinstance(value, RelativeDamping) else float(value) for name, value in by_block.items()}


def resolved(
    by_block: Mapping[str, float | RelativeDamping], operators: Mapping[str, CurvatureOperator]
) -> dict[str, float]:
    """Block → λ, with every rule worked out on the block's operator."""
    return {
        block: value.resolve(operators[block], block) if isinstance(value, RelativeDamping) else value
        for block, value in by_block.items()
    }


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
