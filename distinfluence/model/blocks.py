"""Parameter blocks: which parameters are covered, in which order, and which are treated together.

A row over the parameters, [p], is the blocks' parameters one after the other, so that every block is one contiguous
range of columns. Frozen parameters (`requires_grad=False`) and those that a custom structure leaves out are not
covered; `ParameterBlocks.coverage` says what share of all parameters is. A tied parameter counts once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import torch
from torch import Tensor, nn

from distinfluence.errors import DtypeError, EmptyDataError, NonFiniteError, ParameterBlockError, SettingError
from distinfluence.model.checks.supported import check_model, untrained

T = TypeVar("T")


class BlockMode(StrEnum):
    """The block structures that need no list of names."""

    FULL = "full"
    LAYER_WISE = "layer_wise"
    PARAMETER_WISE = "parameter_wise"


BlockStructure = str | Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class ParameterBlocks:
    """The covered parameters, block by block.

    Attributes:
        names: Block name → names of its parameters, in the order of the columns.
        shapes: Parameter name → shape.
        n_total: Number of elements of all parameters of the model, frozen ones too.
        uncovered: Names of the parameters that are not covered.
    """

    names: dict[str, tuple[str, ...]]
    shapes: dict[str, torch.Size]
    n_total: int
    uncovered: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, structure: BlockStructure = BlockMode.FULL) -> "ParameterBlocks":
        """Group the model's trainable parameters into blocks.

        Args:
            model: The module.
            structure: "full" (one block), "layer_wise" (a block for each module with parameters), "parameter_wise",
                or a mapping block name → parameter names.

        Returns:
            The blocks.

        Raises:
            SettingError: If `structure` is another name.
            EmptyDataError: If the model has no trainable parameters.
            ParameterBlockError: If parameter names are unknown, frozen or in two blocks.
            DtypeError: If `model` is not a module, or its parameters have a dtype that cannot be differentiated.
            UnsupportedModelError: If `model` is of a kind that cannot be differentiated.
            NonFiniteError: If parameters have NaN or infinity.
        """
        check_model(model)
        parameters = dict(model.named_parameters())
        trainable = {name: p for name, p in parameters.items() if p.requires_grad and p.numel() > 0}
        if not trainable:
            raise EmptyDataError(f"`model` must have at least one trainable parameter, got {untrained(model)}")
        names = _block_names(model, trainable, structure)
        covered = {name for group in names.values() for name in group}
        _check_parameters({name: trainable[name] for name in covered})
        return cls(
            names=names,
            shapes={name: trainable[name].shape for group in names.values() for name in group},
            n_total=sum(p.numel() for p in parameters.values()),
            uncovered=tuple(name for name in parameters if name not in covered),
        )

    @property
    def size(self) -> int:
        """p, the number of covered parameters."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def sizes(self) -> list[int]:
        """Number of covered parameters of each block, in the order of `columns`."""
        return [columns.stop - columns.start for columns in self.columns.values()]

    @property
    def coverage(self) -> float:
        """Share of the model's parameters that is covered, 0 to 1."""
        return self.size / self.n_total

    @property
    def columns(self) -> dict[str, slice]:
        """Block name → its range of columns in a row [p]."""
        ranges, start = {}, 0
        for block, group in self.names.items():
            stop = start + sum(self.shapes[name].numel() for name in group)
            ranges[block] = slice(start, stop)
            start = stop
        return ranges

    def only(self, block: str) -> "ParameterBlocks":
        """Return one block alone; the parameters of all others are then uncovered.

        Args:
            block: The block's name.

        Returns:
            The one block.
        """
        group = self.names[block]
        shapes = {name: self.shapes[name] for name in group}
        left_out = tuple(name for name in self.shapes if name not in shapes)
        return ParameterBlocks({block: group}, shapes, self.n_total, self.uncovered + left_out)

    def unflatten(self, rows: Tensor) -> dict[str, Tensor]:
        """Split rows into the parameters' tensors.

        Args:
            rows: Rows over the parameters, [..., p].

        Returns:
            Parameter name → [..., *shape], as views.
        """
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = rows.split(sizes, dim=-1)
        return {
            name: part.reshape(*rows.shape[:-1], *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def flatten(self, tensors: Mapping[str, Tensor], n_leading: int = 0) -> Tensor:
        """Join the parameters' tensors to rows.

        Args:
            tensors: Parameter name → [*leading, *shape].
            n_leading: Number of leading dimensions.

        Returns:
            Rows over the parameters, [*leading, p].
        """
        return torch.cat([_strided(tensors[name]).flatten(start_dim=n_leading) for name in self.shapes], dim=-1)

    def spread(self, values: T | Mapping[str, T], setting: str) -> dict[str, T]:
        """Return one value for each block.

        Args:
            values: One value for all blocks, or a mapping by block name.
            setting: What to call the values in errors.

        Returns:
            Block name → value.

        Raises:
            SettingError: If a block is missing or unknown.
        """
        if not isinstance(values, Mapping):
            return dict.fromkeys(self.names, values)
        unknown = [name for name in values if name not in self.names]
        missing = [name for name in self.names if name not in values]
        if unknown or missing:
            raise SettingError(
                f"`{setting}` must have one value for each block {list(self.names)}, got unknown {unknown}, "
                f"missing {missing}. Give every block a value, or one for all."
            )
        return {name: values[name] for name in self.names}


def _strided(tensor: Tensor) -> Tensor:
    """Return the tensor itself, unless it is the gradient of an `nn.Embedding(sparse=True)`, which is made dense."""
    return tensor.to_dense() if tensor.is_sparse else tensor


def _block_names(
    model: nn.Module, trainable: Mapping[str, Tensor], structure: BlockStructure
) -> dict[str, tuple[str, ...]]:
    if isinstance(structure, Mapping):
        return _custom_names(trainable, structure)
    if structure == BlockMode.FULL:
        return {"full": tuple(trainable)}
    if structure == BlockMode.PARAMETER_WISE:
        return {name: (name,) for name in trainable}
    if structure == BlockMode.LAYER_WISE:
        groups: dict[str, list[str]] = {}
        for name in trainable:
            groups.setdefault(name.rpartition(".")[0] or type(model).__name__, []).append(name)
        return {layer: tuple(group) for layer, group in groups.items()}
    raise SettingError(
        f"`block_structure` must be one of {[mode.value for mode in BlockMode]} or a mapping block name → parameter "
        f"names, got {structure!r}. Choose one of these."
    )


def _custom_names(
    trainable: Mapping[str, Tensor], structure: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    if not structure:
        raise ParameterBlockError("`block_structure` must name at least one block, got an empty mapping.")
    owner: dict[str, str] = {}
    for block, group in structure.items():
        if isinstance(group, str) or not group:
            raise ParameterBlockError(
                f"`block_structure[{block!r}]` must be a list of parameter names, got {group!r}. "
                "List the names as in `model.named_parameters()`."
            )
        for name in group:
            if name not in trainable:
                raise ParameterBlockError(
                    f"`block_structure[{block!r}]` names {name!r}, which is no trainable parameter. "
                    f"Choose among {list(trainable)[:20]}."
                )
            if name in owner:
                raise ParameterBlockError(
                    f"`block_structure` names {name!r} in block {owner[name]!r} and in {block!r}. "
                    "A parameter belongs to one block."
                )
            owner[name] = block
    return {str(block): tuple(group) for block, group in structure.items()}


def _check_parameters(parameters: Mapping[str, Tensor]) -> None:
    dtypes = {p.dtype for p in parameters.values()}
    narrow = {torch.bfloat16, torch.float16, torch.float32}
    if dtypes != {torch.float64} and not dtypes <= narrow:
        raise DtypeError(
            f"`model` must have its trainable parameters in float32, bfloat16 or float16, or all in float64, got "
            f"{sorted(str(dtype) for dtype in dtypes)}. Call `model.float()` or `model.double()` first."
        )
    bad = [name for name, p in parameters.items() if not torch.isfinite(p).all()]
    if bad:
        raise NonFiniteError(
            f"`model` must have finite parameters, got NaN or infinity in {bad}. Load a checkpoint from before the "
            "training diverged."
        )
