"""What users ask of every influence model: checked, and as JSON for provenance and fingerprints."""

from collections.abc import Mapping

import torch

from distinfluence.curvature import SecondOrderMode
from distinfluence.errors import SettingError
from distinfluence.influence.damping import RelativeDamping
from distinfluence.model.blocks import BlockStructure


def checked_mode(mode: SecondOrderMode | str) -> SecondOrderMode:
    """Return the mode of that name. Raises SettingError for another."""
    try:
        return SecondOrderMode(mode)
    except ValueError:
        raise SettingError(
            f"`second_order_mode` must be one of {[m.value for m in SecondOrderMode]}, got {mode!r}. "
            "Choose one of these."
        ) from None


def check_precision(passes: torch.dtype, own: torch.dtype) -> None:
    """Raise SettingError unless passes of a model that is evaluated in `own` may run in this dtype."""
    if passes not in (torch.bfloat16, torch.float16):
        raise SettingError(
            f"`dtype` of mixed precision must be torch.bfloat16 or torch.float16, got {passes}. Take bfloat16: its "
            "range is float32's."
        )
    if own != torch.float32:
        raise SettingError(
            f"mixed precision is for a `model` that is evaluated in float32, got {own}. Convert it, or leave mixed "
            "precision out."
        )


def check_exact(autocast: torch.dtype | None) -> None:
    """Raise SettingError for passes in mixed precision."""
    if autocast is not None:
        raise SettingError(
            "`self_influences` brackets values by products that must be exact to rounding; this `model` runs in "
            "mixed precision. Make the influence model without it."
        )


def common_settings(
    mode: SecondOrderMode,
    structure: BlockStructure,
    asked: Mapping[str, float | RelativeDamping],
    damping: Mapping[str, float] | None,
    autocast: torch.dtype | None,
) -> dict[str, object]:
    """Return the settings that all methods have. damping: block → λ, None where rules are not worked out yet."""
    rules = {block: str(rule) for block, rule in asked.items() if isinstance(rule, RelativeDamping)}
    common: dict[str, object] = {
        "second_order_mode": str(mode),
        "block_structure": {k: list(v) for k, v in structure.items()} if isinstance(structure, Mapping) else structure,
        "hessian_regularization": rules if damping is None else damping,
    }
    mixed = {} if autocast is None else {"mixed_precision": str(autocast).removeprefix("torch.")}
    return common | mixed | ({"damping_rule": rules} if rules else {})
