"""What fixes a forward or an objective besides the model's tensors, as JSON: names, settings, code, captured values.

Tensors alone do not say what a model computes: two networks with equal parameters may differ in an activation, in a
number that one of them holds as an attribute, or in a tensor that a loss has captured. Code and values of a user's own
classes and functions count; those of installed packages count by name and plain settings, and the versions that a
result records. Nothing here says that two things compute the same:
`distinfluence.model.identity.probe` compares what they compute.
"""

import dis
import enum
import functools
import hashlib
import json
import math
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

DEEPEST = 8  # objects inside objects that are looked at
WHOLE = 64  # numbers of a tensor that are kept as they are; a larger one is kept as its sha256
PATHS = frozenset({"name_or_path"})  # where a model came from, which does not change what it is
_MODULE = frozenset({*nn.Module().__dict__, "training"})


def identity(value: object) -> Json:
    """Return what fixes a value, in JSON's types; equal for equal values, also in another process.

    Numbers, strings and collections stand for themselves, tensors for their numbers, functions for their name, code,
    defaults and what they captured or read from their module, other objects for their class and attributes.
    """
    return _Reader().read(value, DEEPEST)


def structure(module: nn.Module) -> dict[str, str]:
    """Return path → digest of each submodule's class, code and attributes; without parameters and buffers."""
    reader = _Reader()
    return {
        path: hashlib.sha256(_text(reader.module(child, DEEPEST)).encode()).hexdigest()[:12]
        for path, child in module.named_modules()
    }


class _Reader:
    """Reads values; what is being read already is not entered again."""

    def __init__(self) -> None:
        self._entered: set[int] = set()

    def read(self, value: Any, depth: int) -> Json:
        if value is None or (isinstance(value, (bool, int, str)) and not isinstance(value, enum.Enum)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        if isinstance(value, (torch.dtype, torch.device, enum.Enum, complex, bytes)):
            return str(value)
        if isinstance(value, Tensor):
            return _numbers(value)
        if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):  # an array or a scalar
            numeric = value.dtype.kind in "biuf"
            return _numbers(torch.as_tensor(value)) if numeric else [str(value.dtype), _short(repr(value.tolist()))]
        if isinstance(value, types.ModuleType):
            return value.__name__
        if depth <= 0 or id(value) in self._entered:
            return _name(type(value))
        self._entered.add(id(value))
        try:
            return self._inside(value, depth - 1)
        finally:
            self._entered.discard(id(value))

    def _inside(self, value: Any, depth: int) -> Json:
        if isinstance(value, Mapping):
            return {str(key): self.read(item, depth) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.read(item, depth) for item in value]
        if isinstance(value, (set, frozenset)):
            return sorted((self.read(item, depth) for item in value), key=_text)
        if isinstance(value, functools.partial):
            return {"partial": self.read(value.func, depth), "args": self.read(value.args, depth)} | {
                key: self.read(item, depth) for key, item in value.keywords.items()
            }
        if isinstance(value, types.MethodType):
            return {"method": value.__name__, "of": self.read(value.__self__, depth)}
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, type):
            return self._class(value, depth)
        if isinstance(value, nn.Module):
            tensors = {**dict(value.named_parameters(recurse=False)), **dict(value.named_buffers(recurse=False))}
            children = {name: self.read(child, depth) for name, child in value.named_children()}
            return {**self.module(value, depth), **{name: _numbers(t) for name, t in tensors.items()}, **children}
        if _is_library(type(value).__module__) or not hasattr(value, "__dict__"):
            return _name(value) if callable(value) and hasattr(value, "__qualname__") else _name(type(value))
        return {"class": self.read(type(value), depth), **self._attributes(vars(value), depth)}

    def module(self, module: nn.Module, depth: int) -> dict[str, Json]:
        own = {name: item for name, item in vars(module).items() if name not in _MODULE and name not in PATHS}
        if _is_library(type(module).__module__):
            plain = {name: item for name, item in own.items() if not name.startswith("_") and _is_plain(item)}
            found: dict[str, Json] = {"class": _name(type(module)), **self._attributes(plain, depth)}
            code = getattr(module, "code", None)  # of a traced or scripted graph, whose class says nothing
            return found | ({"code": _short(code)} if isinstance(code, str) else {})
        kept = {name: item for name, item in own.items() if not _changes_by_itself(type(module), name, item)}
        return {"class": self.read(type(module), depth), **self._attributes(kept, depth)}

    def _attributes(self, attributes: Mapping[str, object], depth: int) -> dict[str, Json]:
        return {str(name): self.read(item, depth) for name, item in sorted(attributes.items())}

    def _class(self, of: type, depth: int) -> Json:
        """Its name, and the code of its own methods and of those that it inherits from the user's other classes."""
        own = [base for base in of.__mro__ if not _is_library(base.__module__)]
        members = [(name, item) for base in own for name, item in sorted(vars(base).items())]
        functions = [f for name, item in members for f in _functions(item) if name != "__annotate__"]
        codes = [_code(f.__code__) for f in functions]
        seen = {name: item for f in functions for name, item in _captured(f).items() if name != "__class__"}
        captured = self._attributes(seen, depth)
        plain = self._attributes({k: v for k, v in members if not k.startswith("__") and _is_plain(v)}, depth)
        if not codes and not plain:
            return _name(of)
        return {"name": of.__qualname__, "code": _short("".join(codes)), **plain} | (
            {"captured": captured} if captured else {}
        )

    def _function(self, function: types.FunctionType, depth: int) -> Json:
        if _is_library(function.__module__):
            return _name(function)
        return {
            "function": function.__qualname__,
            "code": _short(_code(function.__code__)),
            "defaults": self.read([function.__defaults__, function.__kwdefaults__], depth),
            "captured": self._attributes(_captured(function), depth),
        }


def _changes_by_itself(of: type, name: str, attribute: object) -> bool:
    """Whether a user's module may change an attribute as it is used: counts, caches, what a trainer attaches.

    What they do to the numbers is seen by comparing the numbers.
    """
    if isinstance(attribute, (list, dict, set)) or name in _stored(of):
        return True
    framework = any(_is_library(base.__module__) for base in of.__mro__ if base not in (nn.Module, object))
    return name.startswith("_") and (framework or isinstance(attribute, Tensor))


@functools.cache
def _stored(of: type) -> frozenset[str]:
    """Names of the attributes that methods other than `__init__` bind."""
    functions = [
        f
        for base in of.__mro__
        if not _is_library(base.__module__)
        for member in vars(base).values()
        for f in _functions(member)
        if f.__name__ != "__init__"
    ]
    return frozenset(
        str(step.argval) for f in functions for step in dis.get_instructions(f) if step.opname == "STORE_ATTR"
    )


def _captured(function: types.FunctionType) -> dict[str, object]:
    """Return what a function reads from its module and from the functions around it."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    names = _names(function.__code__)
    seen = {name: item for name, item in function.__globals__.items() if name in names and not name.startswith("__")}
    seen |= {name: _content(cell) for name, cell in cells}
    return {name: item for name, item in seen.items() if not isinstance(item, types.ModuleType)}


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None


def _names(code: types.CodeType) -> set[str]:
    """Return what code, and code inside it, asks its module for; attributes of the same names, too."""
    return {*code.co_names}.union(*(_names(item) for item in code.co_consts if isinstance(item, types.CodeType)))


def _functions(member: object) -> Iterable[types.FunctionType]:
    if isinstance(member, property):
        return [f for f in (member.fget, member.fset) if isinstance(f, types.FunctionType)]
    inner = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
    return [inner] if isinstance(inner, types.FunctionType) else []


def _numbers(values: Tensor) -> Json:
    """Return the numbers of a small tensor, else its dtype, shape and a digest."""
    if values.is_meta:
        return f"{values.dtype} {list(values.shape)}"
    plain = values.detach().cpu().to_dense().contiguous()
    if plain.numel() <= WHOLE:
        return _Reader().read(plain.tolist(), 2 + plain.ndim)
    digest = hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    return f"{plain.dtype} {list(plain.shape)} {digest[:16]}"


def _text(value: Json) -> str:
    return json.dumps(value, sort_keys=True)


def _code(code: types.CodeType) -> str:
    """Instructions, names and constants; neither line numbers nor docstrings."""
    has_text = code.co_consts[:1] and isinstance(code.co_consts[0], str)
    constants = map(_constant_text, code.co_consts[1 if has_text else 0 :])
    return _short("\n".join([code.co_code.hex(), *code.co_names, *constants]))


def _constant_text(value: object) -> str:
    if isinstance(value, types.CodeType):
        return _code(value)
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _name(of: Any) -> str:
    return f"{getattr(of, '__module__', None) or 'builtins'}.{getattr(of, '__qualname__', type(of).__qualname__)}"


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return len(value) <= WHOLE and all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.Size, enum.Enum))


_FOLDERS = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


@functools.cache
def _is_library(module: str | None) -> bool:
    """Whether a module belongs to Python or to an installed package, whose version says what it is."""
    if module == "__main__":
        return False
    if module is None or module.partition(".")[0] in (*sys.stdlib_module_names, "distinfluence"):
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return file.startswith(_FOLDERS) or "site-packages" in file or "dist-packages" in file
