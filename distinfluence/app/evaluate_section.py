"""The key `evaluate` of a job file: how models are trained again, and which checks are made of which methods."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, JsonValue, PositiveInt, model_validator

from distinfluence.app.sections import Folder, Method, Referenced, Section

Fraction = Annotated[float, Field(gt=0, lt=1)]


class TrainSection(Section):
    """How a model is trained on a part of the training data. One of these keys.

    Attributes:
        callable: `train(indices, seed)` that returns the trained module, or a class of such callables.
        small_networks: Settings of `SmallNetworks`, which trains many networks at once.
        to_minimum: Settings of `ToMinimum`, which trains to the minimum of a convex loss.
        script: Settings of `ScriptTrainer`, which runs a command for each training.
    """

    callable: Referenced | None = None
    small_networks: dict[str, JsonValue] | None = None
    to_minimum: dict[str, JsonValue] | None = None
    script: dict[str, JsonValue] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> "TrainSection":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"must have one of {', '.join(type(self).model_fields)}, got {', '.join(given) or 'none'}. Write for "
                'instance `train: "my_model:train"` for a callable train(indices, seed) that returns the module.'
            )
        return self


def _expanded(value: object) -> object:
    """Take a text, or a target with arguments, as the callable."""
    if isinstance(value, str) or (isinstance(value, dict) and "target" in value):
        return {"callable": value}
    return value


class RemovalSection(Section):
    """Removing what helps a query most, see `query_loss_rise`.

    Attributes:
        fractions: Parts of the training set to remove.
        queries: Test points to look at.
        seeds: Seeds that each removal is trained from.
        controls: Random sets of the same size.
    """

    fractions: list[Fraction] = Field(default=[0.01, 0.05], min_length=1)
    queries: Annotated[int, Field(ge=2)] = 20
    seeds: PositiveInt = 2
    controls: PositiveInt = 5


class LeaveOneOutSection(Section):
    """Leaving single training points out, see `leave_one_out`.

    Attributes:
        points: Training points to leave out.
        seeds: Seeds that each is trained from.
    """

    points: PositiveInt = 50
    seeds: PositiveInt = 1


class WeightStepsSection(Section):
    """Changing the weight of single training points a little, see `weight_steps`.

    Attributes:
        points: Training points whose weight is changed.
        step: Change of the weight.
    """

    points: PositiveInt = 10
    step: float = Field(default=1e-2, gt=0, lt=1)


class EvaluateSection(Section):
    """What `distinfluence evaluate` does.

    Attributes:
        train: How a model is trained on a part of the training data.
        output: The folder of the bank, the scores and the table.
        methods: Name in the table → method; the job's own method if empty.
        baselines: Name in the table → method, in addition to gradient dot product and cosine, plain loss and random.
        subsets: Random subsets for the linear datamodeling score, at least 8; 0 for none.
        fraction: Part of the training set that a subset holds.
        seeds: Seeds that each subset is trained from.
        seed: Seed of every draw: subsets, queries, bootstrap.
        seed_matched: Number of seeds whose own model is scored, too, for the seed-matched score.
        removal: Removing what helps most; not made unless the key is there.
        leave_one_out: Leaving single points out; not made unless the key is there.
        weight_steps: Small changes of single weights; not made unless the key is there.
        mislabelled: A callable that returns the indices of mislabelled training points, or a list of them.
        planted: A callable that returns test point → training points that were planted for it.
    """

    train: Annotated[TrainSection, BeforeValidator(_expanded)]
    output: Folder
    methods: dict[str, Method] = Field(default_factory=dict)
    baselines: dict[str, Method] = Field(default_factory=dict)
    subsets: Annotated[int, Field(ge=0)] = 100
    fraction: Fraction = 0.5
    seeds: PositiveInt = 5
    seed: int = 0
    seed_matched: Annotated[int, Field(ge=0)] = 0
    removal: RemovalSection | None = None
    leave_one_out: LeaveOneOutSection | None = None
    weight_steps: WeightStepsSection | None = None
    mislabelled: Referenced | list[int] | None = None
    planted: Referenced | None = None

    @model_validator(mode="after")
    def _asks_for_something(self) -> "EvaluateSection":
        if self.seed_matched > (self.seeds if self.subsets else 0):
            raise ValueError(
                f"`seed_matched` must be at most `seeds`, and needs `subsets`; got {self.seed_matched} of {self.seeds} "
                f"seeds and {self.subsets} subsets. Correct one of them."
            )
        others = (self.removal, self.leave_one_out, self.weight_steps, self.mislabelled, self.planted)
        if not self.subsets and all(each is None for each in others):
            raise ValueError("`subsets` must not be 0 where no other check is asked for. Add for instance `removal:`.")
        return self

    @model_validator(mode="before")
    @classmethod
    def _given_keys_are_sections(cls, values: Any) -> Any:
        """Take `removal:` without a value as `removal: {}`: the key is there."""
        sections = ("removal", "leave_one_out", "weight_steps")
        if not isinstance(values, dict):
            return values
        return {key: {} if key in sections and value is None else value for key, value in values.items()}
