"""Configs: frozen dataclasses for the program, a locked ConfigDict for files and flags, one way between them.

Each file of the package that can be configured has its dataclass on top. A file in `configs/` starts from
`to_config_dict(SomeConfig())`, changes values and returns the ConfigDict; `from_dict(SomeConfig, config_dict)`
validates it.
"""

import dataclasses
import difflib
import json
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sora_jax.errors import UserError
from sora_jax.files import read_text

# What a message begins with: the path of a field, as the dataclass that holds it calls it.
FIELD = re.compile(r"(?:--)?(?P<path>[a-z][\w-]*(?:\.\w+|\[\d+\])*)(?P<rest>(?: is | are | names |=|: ).*)", re.DOTALL)
RENAMED = {"mutable": "to_config_dict", "frozen": "from_dict", "plain": "to_dict"}


def __getattr__(name: str):
    """Serve config files of users that were written for version 0.1.0, with a note of the new name."""
    if name not in RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    print(f"sora-jax: sora_jax.config.{name} is called {RENAMED[name]} now; the old name works", file=sys.stderr)
    return globals()[RENAMED[name]]


@dataclasses.dataclass(frozen=True, eq=False)  # a table has no hash, which a mark in a union needs
class OneOf:
    """Mark a field that holds one of several dataclasses: `Annotated[A | B, OneOf(table)]`.

    The keys of `table` are the dataclasses. Each has a field `name` with a value of its own, by which files tell them
    apart. The table may grow after the mark was made.
    """

    table: Mapping[type[typing.Any], object]

    def member(self, values: Mapping, where: str) -> type:
        """Return the dataclass that a mapping of fields names; UserError where none has that name."""
        return choose(f"{where}.name", values.get("name"), {cls.name: cls for cls in self.table})


def check(condition: object, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def choose(option: str, value, table: Mapping):
    """Return table[value]; UserError that names the option and what is allowed where there is no such value."""
    check_word(option, value, table)
    return table[value]


def check_word(option: str, value, allowed: Iterable) -> None:
    """Raise UserError, which lists the words that are allowed, unless the value of an option is one of them."""
    if value not in (words := tuple(allowed)):
        near = did_you_mean(str(value), map(str, words))
        raise UserError(f"{option} is {value!r}; allowed: {', '.join(map(repr, words))}{near}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean NEAREST?", or "" where no known name is near."""
    near = difflib.get_close_matches(name, dict.fromkeys(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def check_option(condition: object, name: str, value: object, allowed: str) -> None:
    """Raise UserError, which names the option as it is typed, unless the condition holds."""
    check(condition, f"--{name.replace('_', '-')} is {value!r}; it must be {allowed}")


def to_dict(config) -> dict:
    """Convert a dataclass into nested dicts of JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_config_dict(config):
    """Convert a dataclass into a locked `ml_collections.ConfigDict`: values may change, names and types may not."""
    from ml_collections import ConfigDict

    def convert(value):
        if dataclasses.is_dataclass(value):
            made = ConfigDict({f.name: convert(getattr(value, f.name)) for f in dataclasses.fields(value)})
            object.__setattr__(made, "dataclass", type(value))  # beside its fields; `overrides` reads the types there
            return made
        if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            return tuple(map(convert, value))
        return value

    return convert(config).lock()


def from_dict(cls, values, where: str = "config", of: str = ""):
    """Build dataclass `cls` (or a member of an annotated `OneOf`) from a mapping; `of` says whose options they are.

    Raises:
        UserError: a name is unknown or a value has the wrong type; the sentence names the field.
    """
    check(hasattr(values, "items"), f"{where} is {values!r}; it must hold the fields of {_name_of(cls)}")
    of = f" where {where}.name is {values.get('name')!r}" if _one_of(cls) else of
    cls = _member(cls, values, where)
    types_ = typing.get_type_hints(cls, include_extras=True)
    unknown = [name for name in values if name not in types_]
    if unknown:
        near, allowed = did_you_mean(unknown[0], types_), ", ".join(types_)
        raise UserError(f"{where}.{unknown[0]} is not an option{of}; allowed: {allowed}{near}")
    arguments = {name: _coerce(types_[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return cls(**arguments)
    except UserError as error:
        raise UserError(_with_whole_path(str(error), where, types_)) from error


def _with_whole_path(message: str, where: str, fields: Iterable[str]) -> str:
    """Return the message of a dataclass with the whole path of the field that it begins with.

    A dataclass names its fields from itself or from a group above: "schedule" or "optim.schedule".
    """
    found = FIELD.match(message)
    if not found:
        return message
    names, above = found["path"].replace("-", "_").split("."), re.sub(r"^--|\[\d+\]", "", where).split(".")
    shared = max((n for n in range(1, len(names)) if above[-n:] == names[:n]), default=0)
    known = shared or re.sub(r"\[\d+\]", "", names[0]) in fields
    return f"{where}.{'.'.join(names[shared:])}{found['rest']}" if known else message


def _one_of(kind) -> OneOf | None:
    return next((mark for mark in getattr(kind, "__metadata__", ()) if isinstance(mark, OneOf)), None)


def _member(kind, values, where: str) -> type:
    """Return the dataclass to build: `kind` itself, or the member of its `OneOf` that `values` names."""
    one_of = _one_of(kind)
    return one_of.member(values, where) if one_of else kind


def _name_of(kind) -> str:
    one_of = _one_of(kind)
    return " or ".join(cls.__name__ for cls in one_of.table) if one_of else kind.__name__


def _coerce(kind, value, where: str):
    one_of = _one_of(kind)
    if one_of or dataclasses.is_dataclass(kind):
        ready = type(value) in one_of.table if one_of else isinstance(value, kind)
        return value if ready else from_dict(kind, value, where)
    if kind is typing.Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return choose(where, value, {argument: argument for argument in arguments})
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
    return value if type(value) in rest else _coerce(rest[0], value, where)


def _coerce_tuple(kinds, value, where: str):
    check(isinstance(value, (tuple, list)), f"{where} is {value!r}; it must be a tuple")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    check(len(kinds) == len(value), f"{where} is {value!r}; it must have {len(kinds)} entries")
    return tuple(_coerce(kind, entry, f"{where}[{i}]") for i, (kind, entry) in enumerate(zip(kinds, value)))


def read_json(path: Path) -> dict:
    """Read a JSON file that the package wrote; UserError where it is damaged."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; remove it, or take another folder") from error


def load(file: str, overrides: Sequence[str] = ()):
    """Load the ConfigDict of `configs/X.py` or `configs/X.py:variant`, changed by `path.to.field=value` strings.

    The file is looked for in the working folder, then among those that came with the package. Reading is
    `ml_collections.config_flags`; what the file raises becomes a UserError.
    """
    from absl import flags
    from ml_collections import config_flags

    from sora_jax.config_files import find_config
    from sora_jax.overrides import override_fields

    values, argument = flags.FlagValues(), f"--config={find_config(file)}"
    # The library loads every file into this module: one that is being read may itself load another.
    sys.modules.pop("config_config", None)
    try:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["sora-jax", argument])
        values(["sora-jax", argument])
    except Exception as error:  # of the library, or of the user's own file, which may raise anything
        if isinstance(error, UserError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise UserError(f"--config={file}: {reason}") from error
    config = values["config"].value
    override_fields(config, overrides, "--config")
    return config


def override(config, changes: Sequence[str], name: str):
    """Change a dataclass by `path.to.field=value` strings, as the command line gives them under `--NAME.`."""
    from sora_jax.overrides import override_fields

    values = to_config_dict(config)
    override_fields(values, changes, f"--{name}")
    return from_dict(type(config), values, f"--{name}")


def differences(old: dict, new: dict, where: str = "") -> Iterator[str]:
    """Yield the paths of the values in which two plain configs differ."""
    for name in {**old, **new}:
        path = f"{where}.{name}" if where else name
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, path)
        elif a != b:
            yield path


def first_difference(old: dict, new: dict) -> str | None:
    """Return the path of the first value in which two plain configs differ, or None."""
    return next(differences(old, new), None)


def value_at(values: typing.Any, path: str) -> typing.Any:
    """Return the value at a dotted path of a plain config; None where there is none."""
    for name in path.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values
