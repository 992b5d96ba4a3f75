"""List the fields of a config, for the help of the commands that take `--config` or `--sampling`."""

import argparse
import contextlib
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sora_jax.errors import UserError
from sora_jax.field_docs import FieldDoc, Group, describe, groups
from sora_jax.parsers.base import Parser

SHOWN = 48  # characters of a value
MOST = 4  # fields that a message names


def list_fields(parser: Parser, option: str = "--config", usual: str = "") -> None:
    """Make a command list the fields behind its help, and name those that are typed without their path.

    option: `--config`, or `--workdir` for the fields of the run's `--sampling`. usual: the config without that option;
    its fields are named, and not listed.
    """
    list_groups(parser, lambda words: _groups(words, option))
    parser.named = lambda words, name: _options(_groups([f"{option}={usual}"] * bool(usual) + [*words], option), name)


def list_groups(parser: Parser, found: Callable[[Sequence[str]], Iterator[Group]]) -> None:
    """Make a command list groups of fields behind its help, which `found` makes of its words; see `list_fields`."""
    parser.fields = lambda words: "".join(map(_as_text, found(words)))
    parser.named = lambda words, name: _options(found(words), name)


def _groups(words: Sequence[str], option: str) -> Iterator[Group]:
    """Yield the groups of the config that the words of a command name; none where they name none."""
    given = [after if "=" not in word else word.partition("=")[2] for word, after in _pairs(words, option)]
    if not given:
        return
    if option == "--workdir":
        from sora_jax.generate.run import read_run_config
        from sora_jax.train.exported import run_folder

        config, path, usual = read_run_config(run_folder(given[-1])).sampling, "sampling", None
    else:
        changes = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
        config, path, usual = read_config(given[-1], changes), "config", None
        with contextlib.suppress(UserError):  # some of its fields must be given
            usual = type(config)()
    yield from groups(config, f"--{path}", default=usual)


def _pairs(words: Sequence[str], option: str) -> list[tuple[str, str]]:
    pairs = zip(words, [*words[1:], ""], strict=True)
    return [(word, after) for word, after in pairs if word.partition("=")[0] == option]


def read_config(file: str, changes: Sequence[str] = ()) -> Any:
    """Return the validated config of a file: of a run, of the quickstart, of a benchmark or of a build."""
    from sora_jax.config import from_dict, load
    from sora_jax.kinds import run_config

    values: Mapping = load(file, changes)
    if "sources" in values:
        from sora_jax.data.building.prepare import BuildConfig

        return from_dict(BuildConfig, values, "--config")
    if "curve" in values:
        from sora_jax.benchmarks.phyworld import PhyworldBench

        return from_dict(PhyworldBench, values, "--config")
    if "kind" not in values:
        from sora_jax.quickstart import QuickstartConfig

        return from_dict(QuickstartConfig, values, "--config")
    return run_config(values)


def _options(found: Iterator[Group], name: str) -> list[str]:
    """Return the options for the fields of a name, or of the nearest name, those nearest to the top first."""
    paths = [(f"{group.path}.{field.name}", field.name) for group in found for field, _ in group.fields]
    near = difflib.get_close_matches(name, {own for _, own in paths}, n=1)
    return sorted((path for path, own in paths if own in near), key=lambda path: path.count("."))[:MOST]


def _as_text(group: Group) -> str:
    formatter = argparse.HelpFormatter("", max_help_position=36)
    formatter.start_section(f"{group.path}: {group.about}".replace("%", "%%"))
    for field, value in group.fields:
        option = f"{group.path}.{field.name}={shown(value)}"
        default = f"default: {shown(field.default) or repr('')}" if value != field.default else ""
        facts = "; ".join(filter(None, [allowed(field), default]))
        about = f"{field.about} ({facts})" if facts else field.about
        formatter.add_argument(argparse.Action([option], dest="", nargs=0, help=about.replace("%", "%%")))
    formatter.end_section()
    return f"\n{formatter.format_help()}"


def allowed(field: FieldDoc) -> str:
    """Return the type or words of a field, unless its line names the words; of a group, or None, its fields."""
    inner = [entry.name for group in field.groups for entry in describe(group)]
    if inner:
        return f"{field.kind}: {', '.join(inner)}"
    return "" if set(field.kind.split(", ")) <= set(re.findall(r"[\w]+", field.about)) else field.kind


def shown(value: Any) -> str:
    """Return a value as it is typed; a long one is cut."""
    text = str(value).replace(", ", ",") if isinstance(value, tuple) else str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
