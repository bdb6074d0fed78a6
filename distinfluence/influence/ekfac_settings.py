"""The hyperparameters of KFAC and EKFAC."""

from collections.abc import Sequence
from dataclasses import dataclass

from distinfluence.curvature.fisher_sums import MOST_EXACT, FisherKind, FisherVectors
from distinfluence.errors import SettingError
from distinfluence.solvers.base import check_count


@dataclass(frozen=True)
class EkfacSettings:
    """The hyperparameters of `EkfacInfluence`, which says what they mean."""

    update_diagonal: bool
    fisher: FisherKind | str
    n_draws: int
    seed: int
    weight_sharing: str
    cg_iterations: int
    residual_rows: int
    query_energy: float | None
    most_dense: int
    recognise: bool

    def __post_init__(self) -> None:
        _check_choice("fisher", self.fisher, ("auto", "exact", "sampled", "empirical"))
        _check_choice("weight_sharing", self.weight_sharing, ("expand", "reduce"))
        check_count("n_draws", self.n_draws)
        for name in ("cg_iterations", "residual_rows", "most_dense"):
            check_count(name, getattr(self, name), 0)
        if self.query_energy is not None and not 0 < self.query_energy <= 1:
            raise SettingError(f"`query_energy` must be above 0 and at most 1, or None, got {self.query_energy!r}.")

    def vectors(self, n_vectors: int) -> FisherVectors:
        """The vectors of the Fisher matrix. n_vectors: for the exact one; below 0 where the distribution is unknown."""
        kind = self.fisher
        if kind == "auto":
            kind = "empirical" if n_vectors < 0 else "exact" if n_vectors <= MOST_EXACT else "sampled"
        return FisherVectors(kind, self.n_draws, self.seed)  # type: ignore[arg-type]


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise SettingError(f"`{name}` must be one of {list(choices)}, got {value!r}. Choose one of these.")
