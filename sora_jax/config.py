"""Configs: frozen dataclasses for the program, a locked ConfigDict for files and flags, one way between them.

Each file of the package that can be configured has its dataclass on top. A file in `configs/` starts from
`mutable(SomeConfig())`, changes values and returns the ConfigDict; `frozen(SomeConfig, config_dict)` validates it.
"""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from sora_jax.errors import UserError
from sora_jax.files import read_text


def check(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def choose(option: str, value: str, table: dict):
    """table[value], or a UserError that names the option and what is allowed."""
    if value not in table:
        raise UserError(f"{option} is {value!r}; allowed: {', '.join(map(repr, table))}")
    return table[value]


def to_dict(config) -> dict:
    """A dataclass as nested dicts of JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_config_dict(config):
    """A dataclass as a locked `ml_collections.ConfigDict`: values may change, names and types may not."""
    from ml_collections import ConfigDict

    def convert(value):
        if dataclasses.is_dataclass(value):
            return ConfigDict({f.name: convert(getattr(value, f.name)) for f in dataclasses.fields(value)})
        if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            return tuple(map(convert, value))
        return value

    return convert(config).lock()


def from_dict(cls, values, where: str = "config"):
    """Builds dataclass `cls` from a mapping; unknown names and wrong types are UserErrors naming the field.

    Of a union of dataclasses it is the first that has all the names.
    """
    cls = _fitting(typing.get_args(cls) or (cls,), values)
    types_ = typing.get_type_hints(cls)
    check(hasattr(values, "items"), f"{where} is {values!r}; it must hold the fields of {cls.__name__}")
    unknown = [name for name in values if name not in types_]
    check(not unknown, f"{where}.{unknown and unknown[0]} is not an option; allowed: {', '.join(types_)}")
    arguments = {name: _coerce(types_[name], value, f"{where}.{name}") for name, value in values.items()}
    return cls(**arguments)


def _fitting(classes, values):
    """The first of the dataclasses that has all names of a mapping; the first of all where none has."""
    fields = ({field.name for field in dataclasses.fields(cls)} for cls in classes)
    fit = (cls for cls, names in zip(classes, fields) if hasattr(values, "items") and names.issuperset(values))
    return next(fit, classes[0])


def _coerce(kind, value, where: str):
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else from_dict(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _coerce_union(arguments, value, where)
    if origin is tuple:
        return _coerce_tuple(arguments, value, where)
    if kind is float and type(value) is int:
        return float(value)
    check(type(value) is kind, f"{where} is {value!r}; it must be of type {kind.__name__}")
    return value


def _coerce_union(kinds, value, where: str):
    if value is None:
        check(type(None) in kinds, f"{where} is None; it must have a value")
        return None
    rest = [kind for kind in kinds if kind is not type(None)]
    if type(value) in rest:
        return value
    return _coerce(_fitting(rest, value) if all(map(dataclasses.is_dataclass, rest)) else rest[0], value, where)


def _coerce_tuple(kinds, value, where: str):
    check(isinstance(value, (tuple, list)), f"{where} is {value!r}; it must be a tuple")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    check(len(kinds) == len(value), f"{where} is {value!r}; it must have {len(kinds)} entries")
    return tuple(_coerce(kind, entry, f"{where}[{i}]") for i, (kind, entry) in enumerate(zip(kinds, value)))


def read_json(path: Path) -> dict:
    """The contents of a JSON file that the package wrote; UserError where it is damaged."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; remove it, or take another folder") from error


def load(file: str, overrides: Sequence[str] = ()):
    """The ConfigDict of `configs/X.py` or `configs/X.py:variant`, changed by `path.to.field=value` strings.

    Reading, typing and overriding are `ml_collections.config_flags`; its errors become UserErrors.
    """
    from ml_collections import config_flags

    path = file.partition(":")[0]
    check(Path(path).is_file(), f"--config is {file!r}; there is no file {path!r}")
    arguments = [f"--config={file}", *(f"--config.{change}" for change in overrides)]
    return _parsed(config_flags.DEFINE_config_file, "config", arguments, lambda: load(file) if overrides else None)


def override(config, changes: Sequence[str], name: str):
    """The dataclass changed by `path.to.field=value` strings, as the command line gives them under `--NAME.`."""
    from ml_collections import config_flags

    arguments = [f"--{name}.{change}" for change in changes]
    define = functools.partial(config_flags.DEFINE_config_dict, config=to_config_dict(config))
    return from_dict(type(config), _parsed(define, name, arguments, lambda: to_config_dict(config)), name)


def _parsed(define: Callable, name: str, arguments: Sequence[str], known: Callable[[], object]):
    """The ConfigDict of a flag after reading the arguments; `known` gives it before the changes, to explain errors."""
    from absl import flags

    values = flags.FlagValues()
    try:
        define(name, flag_values=values, sys_argv=["sora-jax", *arguments])
        values(["sora-jax", *arguments])
    except Exception as error:  # of the library, or of the user's own file, which may raise anything
        if isinstance(error, UserError):
            raise
        raise UserError(_explain(arguments, known(), error)) from error
    return values[name].value


def _explain(arguments: Sequence[str], known, error: Exception) -> str:
    """One sentence for the first override that names no field or a group of them, else the library's own reason."""
    for argument in arguments:
        path, _, value = argument.partition("=")
        node = known
        for name in path.split(".")[1:]:
            if not hasattr(node, "keys") or name not in node:
                allowed = ", ".join(node) if hasattr(node, "keys") else "nothing"
                return f"{path} is not an option: there is no {name!r}; allowed there: {allowed}"
            node = node[name]
        if hasattr(node, "keys") and len(path.split(".")) > 1:
            return f"{path} is {value!r}; it is a group of options, give one of them: {', '.join(node)}"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
    # Of a field that is not there the library lists all others, nested, in one line.
    reason = reason.split(" Other fields present")[0].removeprefix("'")
    return reason.removeprefix("flag ") if reason.startswith("flag ") else f"{arguments[0]}: {reason}"


def first_difference(old: dict, new: dict, where: str = "") -> str | None:
    """The path of the first value in which two plain configs differ, or None."""
    for name in {**old, **new}:
        path = f"{where}.{name}" if where else name
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            deeper = first_difference(a, b, path)
            if deeper:
                return deeper
        elif a != b:
            return path
    return None
