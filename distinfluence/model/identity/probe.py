"""What a model makes of a few samples from all over a data set: numbers that two equal models share.

`Probe` holds losses and derivatives along a fixed vector at drawn samples (see `draw`); two of them are
compared with a tolerance, so that another device or number of threads is the same model, and another activation is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from distinfluence.model.batch import Batch, batch_length, take
from distinfluence.model.gradients import loss_gradients, measurement_gradients
from distinfluence.model.identity.draw import name_seed
from distinfluence.model.objective import Objective
from distinfluence.model.sample_risk import SampleRisk

PROBE_BYTES = 4 * 2**20  # of gradients that are held at once, but one at least
TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 3e-2, "float16": 3e-2}  # of the norm


@dataclass(frozen=True)
class Probe:
    """What a model makes of drawn samples.

    losses, measurements: of each; loss_slopes, measurement_slopes: derivatives of these along a fixed vector. dtype: of
    the model's passes, which says how well two of them agree.
    """

    dtype: str
    losses: tuple[float, ...]
    loss_slopes: tuple[float, ...]
    measurements: tuple[float, ...]
    measurement_slopes: tuple[float, ...]

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_json(cls, raw: Mapping[str, object]) -> Self:
        """Return the probe again.

        Raises:
            KeyError: If `raw` is anything else.
        """
        values = {field.name: raw[field.name] for field in fields(cls)}
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})  # type: ignore[arg-type]

    def differences(self, other: "Probe") -> list[str]:
        """Say what differs by more than rounding; empty if the two are of the same model and objective."""
        allowed = max(TOLERANCE.get(self.dtype, 1e-4), TOLERANCE.get(other.dtype, 1e-4))
        found = []
        for name in ("losses", "loss_slopes", "measurements", "measurement_slopes"):
            here, there = (torch.tensor(getattr(one, name), dtype=torch.float64) for one in (self, other))
            if len(here) != len(there):
                found.append(f"{_WORDS[name]} of {len(here)} drawn samples against {len(there)}")
                continue
            error, norm = float((here - there).norm()), max(float(here.norm()), float(there.norm()))
            if not error <= allowed * norm:
                found.append(f"{_WORDS[name]} of the drawn samples differ by {error / norm if norm else error:.2g}")
        return found


_WORDS = {
    "losses": "losses",
    "loss_slopes": "loss gradients",
    "measurements": "measurements",
    "measurement_slopes": "measurement gradients",
}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Probed:
    """A probe with what else its gradients say.

    gradients: their sum by parameter; of_measurements: the same of the measurements, where they are not the losses.
    without_gradient: parameters that never receive one.
    """

    probe: Probe
    gradients: Mapping[str, Tensor]
    of_measurements: Mapping[str, Tensor] | None
    without_gradient: tuple[str, ...]


def probed(risk: SampleRisk, batches: Sequence[Batch]) -> Probed:
    """Return what the model makes of drawn samples; one pass of gradients over them, two where measurements differ.

    batches: as `together` makes them, placed.
    """
    ours = type(risk.objective).measurements is not Objective.measurements
    losses, slopes, measured, measured_slopes = [], [], [], []
    total = {
        name: torch.zeros(shape, dtype=risk.dtype, device=risk.device) for name, shape in risk.blocks.shapes.items()
    }
    asked_total = {name: torch.zeros_like(tensor) for name, tensor in total.items()} if ours else None
    without, vectors = set(total), _vectors(risk)
    at_once = max(1, PROBE_BYTES // (risk.size * risk.dtype.itemsize))
    for batch in batches:
        for start in range(0, batch_length(batch), at_once):
            part = take(batch, start, min(start + at_once, batch_length(batch)))
            gradients = loss_gradients(risk, part)
            losses.append(gradients.values)
            slopes.append(gradients.rows @ vectors)
            for name, tensor in risk.blocks.unflatten(gradients.rows).items():
                total[name] += tensor.sum(dim=0)
                if name in without and bool(tensor.any()):
                    without.discard(name)
            del gradients
            if ours:
                asked = measurement_gradients(risk, part)
                measured.append(asked.values)
                measured_slopes.append(asked.rows @ vectors)
                for name, tensor in risk.blocks.unflatten(asked.rows).items():
                    asked_total[name] += tensor.sum(dim=0)  # type: ignore[index]
    dtypes = {risk.autocast} if risk.autocast is not None else {p.dtype for p in risk.module.parameters()}
    narrow = next((d for d in (torch.bfloat16, torch.float16) if d in dtypes), risk.dtype)
    probe = Probe(
        str(narrow).removeprefix("torch."),
        _numbers(losses),
        _numbers(slopes),
        _numbers(measured if ours else losses),
        _numbers(measured_slopes if ours else slopes),
    )
    return Probed(probe, total, asked_total, tuple(name for name in total if name in without))


def _vectors(risk: SampleRisk) -> Tensor:
    """Return a vector [p] that depends on names, shapes and nothing else."""
    parts = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(name_seed(name)), dtype=risk.dtype)
        for name, shape in risk.blocks.shapes.items()
    }
    return risk.blocks.flatten(parts).to(risk.device)


def _numbers(parts: Sequence[Tensor]) -> tuple[float, ...]:
    return tuple(torch.cat([part.double().cpu() for part in parts]).tolist())


@dataclass(frozen=True)
class Checked:
    """What the checks of a fit found. remarks: for its report; products: the matrix whose products were compared."""

    remarks: tuple[str, ...]
    probe: Probe
    products: str | None
