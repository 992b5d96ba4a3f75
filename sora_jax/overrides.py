"""Change fields of a ConfigDict by the words of a command line, `path.to.field=value`.

`ml_collections` has flags for this, but none for a field that holds None, and its messages speak of its own flags. A
ConfigDict that `to_config_dict` made knows the dataclass of each group, and so the type of each field; elsewhere the
value that a field holds stands in for its type.
"""

import ast
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence

from sora_jax.config import OneOf, check, did_you_mean, to_config_dict
from sora_jax.errors import UserError

STEP = re.compile(r"\.?([A-Za-z_]\w*)|\[(-?\d+)\]")  # of a path: the name of a field, or the index of an entry
BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
NONE = type(None)


def override_fields(values, changes: Sequence[str], prefix: str) -> None:
    """Change a ConfigDict in place; the option of a change is `prefix.CHANGE`.

    A value of None removes a group that may be left out; giving one of the fields of a group that is None makes the
    group, with the defaults of the others.

    Raises:
        UserError: there is no such field, or the value is not of its type. The message names the option as typed.
    """
    for change in changes:
        path, equals, text = change.partition("=")
        option = f"{prefix}.{path}"
        steps = [name or int(index) for name, index in STEP.findall(path)]
        whole = "".join(found[0] for found in STEP.finditer(path))
        check(steps and whole == path, f"{option} is not an option; write {prefix}.NAME=VALUE, such as a.b or a[0].b")
        _set(values, typing.Any, steps, text if equals else None, option)


def _set(value, kind, steps: Sequence[str | int], text: str | None, option: str):
    """Return `value`, of type `kind`, with the field at the end of the steps changed; groups are changed in place."""
    if not steps:
        return _read(text, kind, value, option)
    step, *rest = steps
    if value is None and (group := _group(kind)):
        value = _make(group, option)
    if _is_group(value):
        check(step in value, _no_such(option, step, value))
        with value.ignore_type():
            value[step] = _set(value[step], _kinds(value).get(step, typing.Any), rest, text, option)
        return value
    check(isinstance(value, (tuple, list)), f"{option} is not an option: {value!r} has no {step!r}")
    shown = f"[{step}]" if isinstance(step, int) else repr(step)
    there = isinstance(step, int) and -len(value) <= step < len(value)
    check(there, f"{option} is not an option: there is no {shown} among {len(value)} entries, named by [0], [1], ...")
    assert isinstance(step, int)
    entries = list(value)
    entries[step] = _set(entries[step], _entry_kind(kind, step), rest, text, option)
    return tuple(entries)


def _no_such(option: str, step: str | int, group) -> str:
    near = did_you_mean(str(step), group)
    return f"{option} is not an option: there is no {step!r}; allowed there: {', '.join(group)}{near}"


def _is_group(value) -> bool:
    return hasattr(value, "ignore_type")


def _kinds(group) -> dict:
    """Return the types of the fields of a ConfigDict, as far as they are known."""
    return typing.get_type_hints(getattr(group, "dataclass", None) or NONE, include_extras=True)


def _entry_kind(kind, index: int):
    """Return the type of an entry of a tuple."""
    for member in _members(kind):
        arguments = typing.get_args(member)
        if typing.get_origin(member) is tuple and arguments:
            return arguments[0] if arguments[-1] is Ellipsis else arguments[index % len(arguments)]
    return typing.Any


def _members(kind) -> tuple:
    """Return the types of a union, or the type alone."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def _group(kind) -> type | None:
    """Return the dataclass that is made where a field of this type holds None: the only one, or the first."""
    for member in _members(kind):
        marks = getattr(member, "__metadata__", ())
        tables = [list(mark.table) for mark in marks if isinstance(mark, OneOf)]
        found = tables[0][0] if tables else member
        if dataclasses.is_dataclass(found):
            return typing.cast(type, found)
    return None


def _make(group: type, option: str):
    needed = [f.name for f in dataclasses.fields(group) if f.default is f.default_factory is dataclasses.MISSING]
    check(not needed, f"{option} is not an option: its group is None, and needs {', '.join(needed)}")
    return to_config_dict(group())


def _read(text: str | None, kind, old, option: str):
    """Return the value that a text stands for; `old` tells the type where `kind` does not."""
    if text is None:
        check(type(old) is bool, f"{option} is given without a value; write {option}=VALUE")
        return True
    kinds = [member for member in _members(kind) if member is not typing.Any] or [NONE, type(old)]
    if text == "None" and NONE in kinds:
        return None
    if _is_group(old) or _group(kind):
        return _read_group(text, kind, old, option)
    plain = [member for member in kinds if member is not NONE]
    for member in plain:
        try:
            return _plain(text, member)
        except ValueError:
            continue
    if not plain:  # a field that holds None, of a config that was not made by `to_config_dict`
        return _literal(text)
    allowed = " or ".join(["None"] * (NONE in kinds) + [_name(member) for member in plain])
    raise UserError(f"{option} is {text!r}; it must be {allowed}")


def _read_group(text: str, kind, old, option: str):
    """Return the group that a dict stands for; its other fields are the defaults."""
    from ml_collections import ConfigDict

    found = _literal(text)
    if isinstance(found, Mapping):
        return ConfigDict(found)
    fields = ", ".join(old if _is_group(old) else [field.name for field in dataclasses.fields(_group(kind) or old)])
    none = ", or None" * (NONE in _members(kind))
    raise UserError(f"{option} is {text!r}; it is a group of options, give one of them: {fields}{none}")


def _plain(text: str, kind):
    """Return the value of a type that a text stands for; ValueError where it stands for none."""
    if typing.get_origin(kind) is typing.Literal:
        return next((value for value in typing.get_args(kind) if str(value) == text), text)
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise ValueError(text)
        return BOOLEANS[text.lower()]
    if kind is int:
        return int(text, 0 if text.lower().lstrip("+-").startswith(("0x", "0o", "0b")) else 10)
    if kind is float:
        return float(text)
    if kind is str:
        return text
    found = _literal(text)
    if typing.get_origin(kind) is tuple or kind is tuple:
        return tuple(found) if isinstance(found, (tuple, list)) else (found,)
    return found


def _literal(text: str):
    """Return what a text stands for in Python, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _name(kind) -> str:
    if kind is bool:
        return "true or false"
    return f"of type {getattr(kind, '__name__', str(kind))}"
