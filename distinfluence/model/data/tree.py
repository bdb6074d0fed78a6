"""Trees: a leaf, a tuple of trees or a dict of trees. One recursion for all that is done to them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def map_leaves(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Return a tree of the same form with `function` applied to every leaf, and to the same leaf of the others.

    Lists become tuples and other mappings become dicts.
    """
    if isinstance(tree, Mapping):
        return {str(key): map_leaves(function, tree[key], *(other[key] for other in others)) for key in tree}
    if isinstance(tree, (tuple, list)):
        return tuple(map_leaves(function, *parts) for parts in zip(tree, *others, strict=True))
    return function(tree, *others)


def named_leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield every leaf with the name by which a user would reach it."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from named_leaves(value, f"{name}[{key!r}]")
    elif isinstance(tree, (tuple, list)):
        for index, value in enumerate(tree):
            yield from named_leaves(value, f"{name}[{index}]")
    else:
        yield name, tree


def same_form(a: Any, b: Any) -> bool:
    """Return whether two trees have their leaves in the same places."""
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same_form(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same_form, a, b))
    return not isinstance(a, (dict, tuple)) and not isinstance(b, (dict, tuple))
