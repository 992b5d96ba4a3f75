"""Read the documentation of config fields from where they are declared.

A field is described by a string below it, a comment behind it, or lines of comment above it. One that holds a group of
fields, and has none of these, is described by the docstring of the group.
"""

import ast
import dataclasses
import functools
import inspect
import io
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from typing import Any

from sora_jax.config import OneOf
from sora_jax.errors import UserError

MARKS = ("fmt:", "noqa", "type:")  # comments for tools
NO_WORD = "no such word"
WORDS = re.compile(r"'([^']*)'")


@dataclasses.dataclass(frozen=True)
class FieldDoc:
    """Hold what is known of a field: its type or allowed words, its default, and its line of documentation."""

    name: str
    kind: str
    default: Any
    about: str
    groups: tuple[type, ...]  # the dataclasses that it may hold


def summary(text: str | None) -> str:
    """Return the first sentence of a docstring, without its full stop."""
    first = re.split(r"\.\s+(?=[A-Z`])|\n\s*\n|:\s*\n", f"{text or ''}\n\n", maxsplit=1)[0]
    return " ".join(first.split()).rstrip(".:")


@functools.cache
def describe(cls: type) -> tuple[FieldDoc, ...]:
    """Describe the fields of a dataclass, in order."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        texts |= _texts(base) if dataclasses.is_dataclass(base) else {}
    hints = typing.get_type_hints(cls, include_extras=True)
    found = []
    for field in dataclasses.fields(cls):
        made = None if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = made if field.default is dataclasses.MISSING else field.default
        groups = tuple(dict.fromkeys(_groups(hints[field.name])))
        about = texts.get(field.name) or (summary(groups[0].__doc__) if groups else "")
        kind = _words(cls, field.name, hints[field.name]) or _kind(hints[field.name])
        found.append(FieldDoc(field.name, kind, default, about, groups))
    return tuple(found)


def _texts(cls: type) -> dict[str, str]:
    """Return the text at each field that a class itself declares."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    (made,) = ast.parse(source).body
    assert isinstance(made, ast.ClassDef)
    found = {}
    for node, after in zip(made.body, [*made.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            text = _below(after) or _behind(node, comments) or _above(node, comments)
            found[ast.unparse(node.target)] = " ".join(text.split()).rstrip(".")
    return {name: text for name, text in found.items() if text}


def _below(node: ast.stmt | None) -> str:
    value = node.value if isinstance(node, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


def _behind(node: ast.AnnAssign, comments: dict[int, tokenize.TokenInfo]) -> str:
    token = comments.get(node.end_lineno or 0)
    text = token.string.lstrip("# ") if token else ""
    return "" if text.startswith(MARKS) else text


def _above(node: ast.AnnAssign, comments: dict[int, tokenize.TokenInfo]) -> str:
    lines: list[str] = []
    while (token := comments.get(node.lineno - 1 - len(lines))) and token.line.lstrip().startswith("#"):
        lines.insert(0, token.string.lstrip("# "))
    return " ".join(lines)


def _kind(hint: Any) -> str:
    """Return a type as a user writes its values."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if one_of := [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, OneOf)]:
        return "group; name: " + ", ".join(member.name for member in one_of[0].table)
    if origin is typing.Literal:
        return ", ".join(map(str, arguments))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_kind(member) for member in arguments)
    if origin is tuple:
        inner = ", ".join("..." if entry is Ellipsis else _kind(entry) for entry in arguments)
        return f"({inner})"
    if hint is types.NoneType:
        return "None"
    return "group" if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", str(hint)).lower()


def _groups(hint: Any) -> Iterator[type]:
    """Yield the dataclasses that a type allows."""
    marks = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, OneOf)]
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for member in marks[0].table if marks else typing.get_args(hint):
        if not isinstance(member, str):
            yield from _groups(member)


def _words(cls: type, name: str, hint: Any) -> str:
    """Return the words that a field of text takes, as its own config lists them where it refuses another; or ""."""
    if hint not in (str, tuple[str, ...]):
        return ""
    try:
        cls(**{name: NO_WORD if hint is str else (NO_WORD,)})
    except UserError as error:
        words = ", ".join(WORDS.findall(str(error).partition("; allowed: ")[2]))
        return words if hint is str or not words else f"some of {words}"
    return ""


def reachable(*roots: type) -> dict[type, list[str]]:
    """Return all dataclasses below these, each with the paths that lead to it."""
    found: dict[type, list[str]] = {}

    def visit(cls: type, path: str) -> None:
        paths = found.setdefault(cls, [])
        if path in paths:
            return
        paths.append(path)
        for field in describe(cls):
            entry = "[0]" if field.kind.startswith("(") else ""
            for group in field.groups:
                visit(group, f"{path}.{field.name}{entry}")

    for root in roots:
        visit(root, "config")
    return found


@dataclasses.dataclass(frozen=True)
class Group:
    """Hold a group of a config: its path, its line of documentation, and its fields with the values they have."""

    path: str
    about: str
    fields: tuple[tuple[FieldDoc, Any], ...]


def groups(config: Any, path: str, about: str = "", default: Any = None) -> Iterator[Group]:
    """Yield the groups of a config, outer ones first; defaults are those of the config as a whole."""
    cls: type = type(config)
    rows, inner = [], []
    for field in describe(cls):
        value, there = getattr(config, field.name), f"{path}.{field.name}"
        usual = getattr(default, field.name) if type(default) is cls else field.default
        entries = value if isinstance(value, tuple) else ()
        if dataclasses.is_dataclass(value):
            inner.append((value, there, field.about, usual))
        elif entries and dataclasses.is_dataclass(entries[0]):
            inner += [(entry, f"{there}[{i}]", field.about, None) for i, entry in enumerate(entries)]
        else:
            rows.append((dataclasses.replace(field, default=usual), value))
    yield Group(path, about or summary(cls.__doc__), tuple(rows))
    for arguments in inner:
        yield from groups(*arguments)
