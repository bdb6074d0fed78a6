"""The options of a run: one value, from the job file or the caller to the stages."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypedDict, Unpack

from distinfluence.errors import SettingError
from distinfluence.influence.scores import InfluenceMode, influence_mode
from distinfluence.solvers.base import check_count, hold_plain
from distinfluence.store.format.folder import place_of
from distinfluence.store.format.layout import FLOAT32_BITS
from distinfluence.store.format.remote import RemoteFolder
from distinfluence.store.write.resume import check_output

STRATEGIES = ("auto", "rows", "data")
DEFAULT_CONTRIBUTIONS = 10  # Pairs at each end of a ranking that `contributions=True` means.


class ExistingResult(StrEnum):
    """What a run does with a result that is already at its path."""

    REFUSE = "refuse"  # Raise StoreExistsError.
    REPLACE = "replace"  # Delete it and start again.
    RESUME = "resume"  # Continue it; start where there is none.
    REPAIR = "repair"  # Read all of it first, then resume and make again what is damaged.


class RunSettings(TypedDict, total=False):
    """The fields of `RunOptions` as keyword arguments."""

    mode: InfluenceMode | str
    chunk_size: int | None
    test_chunk_size: int | None
    panel_size: int | None
    solve: str
    top_k: int
    mantissa_bits: int
    contributions: int
    self_influence: bool
    existing: ExistingResult | str
    attributes: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of `InfluenceCalculator.to_zarr` and `InfluenceCalculator.plan`, checked when they are made.

    Args:
        mode: "up" or "perturbation".
        chunk_size: Training points in a strip; chosen by default.
        test_chunk_size: Test points that are solved together; chosen by default.
        panel_size: Test points whose factors a worker holds at a time. The training gradients are computed once for
            each panel. By default, a panel takes a quarter of a worker's memory.
        solve: "rows" solves each test chunk on one worker, "data" spreads each sweep over all workers, "auto" chooses.
        top_k: Most helpful and most harmful training points that are stored for each test point.
        mantissa_bits: Bits of the stored values. Fewer than 23 (float32) round the values with a relative error of
            2^-(bits + 1), which error bounds include, and compress them: 10 bits take about half the space.
        contributions: Number of pairs at each end of a ranking for which the contribution of each layer is stored,
            and of each position of a sequence if the method knows it. True means 10. The gradients of ranked training
            points are computed once more.
        self_influence: Whether to store what each training point does to its own loss. It costs as much as solving for
            n_train test points: little for methods that do not sweep over data, more than everything else for others.
        existing: What to do with a result that is already at the path, see `ExistingResult`. A run resumes only a
            result of the same model, data and settings; `contributions` and `self_influence` can be added then.
        attributes: JSON values to keep in the result.

    Raises:
        SettingError: If `mode`, a size of chunks or panels, `solve`, `contributions` or `existing` is not one of the
            values above.
    """

    mode: InfluenceMode | str = InfluenceMode.UP
    chunk_size: int | None = None
    test_chunk_size: int | None = None
    panel_size: int | None = None
    solve: str = "auto"
    top_k: int = 50
    mantissa_bits: int = FLOAT32_BITS
    contributions: int = 0
    self_influence: bool = False
    existing: ExistingResult | str = ExistingResult.REFUSE
    attributes: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hold_plain(self)
        for name in ("chunk_size", "test_chunk_size", "panel_size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        object.__setattr__(self, "mode", influence_mode(self.mode))
        if self.existing not in list(ExistingResult):
            raise SettingError(f"`existing` must be one of {[*map(str, ExistingResult)]}, got {self.existing!r}.")
        object.__setattr__(self, "existing", ExistingResult(self.existing))
        if self.solve not in STRATEGIES:
            raise SettingError(f"`solve` must be one of {list(STRATEGIES)}, got {self.solve!r}. Choose one of these.")
        if not isinstance(self.contributions, int) or self.contributions < 0:
            raise SettingError(f"`contributions` must be True, False or how many, got {self.contributions!r}.")
        if self.contributions and self.mode is not InfluenceMode.UP:
            raise SettingError("`contributions` are of influences of mode 'up', got mode 'perturbation'. Omit them.")
        shown = DEFAULT_CONTRIBUTIONS if self.contributions is True else int(self.contributions)
        object.__setattr__(self, "contributions", shown)

    @property
    def replaces(self) -> bool:
        """Whether a result at the path is deleted first."""
        return self.existing is ExistingResult.REPLACE

    @property
    def resumes(self) -> bool:
        """Whether a result at the path is continued."""
        return self.existing in (ExistingResult.RESUME, ExistingResult.REPAIR)

    def updated(self, **settings: Unpack[RunSettings]) -> "RunOptions":
        """Return these options with some of them changed.

        Args:
            **settings: The options to change, by name.

        Returns:
            The new options.

        Raises:
            SettingError: If a value is not valid.
            TypeError: If there is no option of that name. The message lists all options.
        """
        names = [option.name for option in fields(self)]
        unknown = [name for name in settings if name not in names]
        if unknown:
            raise TypeError(f"`{unknown[0]}` is not an option of a run. Options: {', '.join(names)}.")
        return replace(self, **settings)

    def continuing(self, recorded: Mapping[str, Any] | None) -> "RunOptions":
        """Return the options with the panel and the strategy that a result was begun with, where none are given.

        Args:
            recorded: What `distinfluence.store.chunks_of` returned for the result.

        Returns:
            The options for resuming it.
        """
        if recorded is None:
            return self
        solve = recorded.get("solve", self.solve) if self.solve == "auto" else self.solve
        return replace(self, panel_size=self.panel_size or recorded["panel"], solve=solve)

    def check_path(self, path: str | Path) -> None:
        """Pass if a result with these options can be written to `path`. Nothing is computed or touched.

        Args:
            path: A folder, or a URL that fsspec can write to.

        Raises:
            ForeignStoreError: If something else lies there.
            StoreExistsError: If a result lies there and `existing` is "refuse".
            SettingError: If `path` is a URL and `contributions` are asked for.
        """
        check_output(path, overwrite=self.replaces, resume=self.resumes)
        if self.contributions and isinstance(place_of(path), RemoteFolder):
            raise SettingError(f"`contributions` are written to folders alone, got `path` {path}. Omit them.")
