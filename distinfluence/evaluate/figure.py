"""What an evaluation says: one number with its interval, and the best that could be reached."""

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Figure:
    """One number of an evaluation.

    Attributes:
        check: What was measured, as "LDS" or "mislabel recall".
        method: Name of the method or baseline whose scores were measured.
        value: The number.
        low: Lower end of the 95 % bootstrap interval; NaN where there is none.
        high: Upper end of the interval; NaN where there is none.
        standard_error: Standard deviation of the bootstrap draws; NaN where there is none.
        ceiling: What other seeds of the retraining reach in place of scores; NaN where that has no meaning.
        n_queries: Test points that the number is about; 0 where it is not about test points.
        n_retrainings: Retrained models that the number rests on; 0 where it needs none.
        remark: What a reader must know to read it; empty if nothing.
    """

    check: str
    method: str
    value: float
    low: float = math.nan
    high: float = math.nan
    standard_error: float = math.nan
    ceiling: float = math.nan
    n_queries: int = 0
    n_retrainings: int = 0
    remark: str = ""

    def to_json(self) -> dict[str, str | int | float | None]:
        """Return the fields as JSON values.

        Returns:
            Name → value, with None in place of NaN.
        """
        values: dict[str, str | int | float] = asdict(self)
        return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]"
        ceiling = "" if math.isnan(self.ceiling) else f", ceiling {self.ceiling:.3f}"
        remark = f" ({self.remark})" if self.remark else ""
        return f"{self.check}, {self.method}: {self.value:.3f}{interval}{ceiling}{remark}"
