"""Write docs/options.md: all commands with their options, and all groups of configs with their fields.

    python docs/make_options.py

Everything on that page comes from the parsers and from the lines of documentation at the fields.
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from sora_jax import cli
from sora_jax.benchmarks.phyworld import PhyworldBench
from sora_jax.data.building.prepare import BuildConfig
from sora_jax.evaluate.suite import METRICS
from sora_jax.field_docs import FieldDoc, describe, reachable, summary
from sora_jax.kinds import KINDS
from sora_jax.parsers.configs import list_configs
from sora_jax.parsers.evaluate import FIELDS as METRIC_FIELDS
from sora_jax.quickstart import QuickstartConfig

PAGE = Path(__file__).with_name("options.md")
ROOTS = (*(kind.config for kind in KINDS.values()), QuickstartConfig, PhyworldBench, BuildConfig)
HEAD = """\
# Options

All commands with their options, and all fields of configs. `python docs/make_options.py` writes this page from the
parsers and from the lines of documentation at the fields. On the command line, `sora-jax COMMAND --help` prints the
options, `sora-jax train --config=FILE --help` also the fields with the values that they have in that config, and
`sora-jax sample --workdir=RUN --help` those of the sampling of a run.

`--quiet`, of every command, leaves progress bars and notes out. Where a command has `--json`, its result is one JSON
value on stdout, and all else goes to stderr.
"""


def page() -> str:
    """Return the page."""
    parsers = dict(_parsers(cli.make_parser(), "sora-jax"))
    groups = reachable(*ROOTS)
    contents = [f"- [{title}](#{anchor(title)})" for title in ("Commands", "Shipped configs", "Fields")]
    lines = [HEAD, *contents, "", "## Commands", ""]
    lines += [f"- [`{name}`](#{anchor(name)}): {about}" for name, (_, about) in parsers.items()]
    for name, (parser, _) in parsers.items():
        lines += ["", f"### {name}", "", *_options(parser)]
    lines += [
        "",
        "## Shipped configs",
        "",
        "`sora-jax configs NAME` prints the commands, hardware and time of one.",
        "",
    ]
    rows = (
        (f"`{e['file']}`", ", ".join(f"`{v}`" for v in e["variants"] if v) or "-", e["about"]) for e in list_configs()
    )
    lines += [*_table(("file", "variants, the default first", "what it is"), rows), "", "## Fields", ""]
    lines.append("A field is written as `--config.NAME=VALUE`, with the path of its group. The groups:\n")
    lines += [f"- [{cls.__name__}](#{cls.__name__.lower()}): {_written(paths)}" for cls, paths in groups.items()]
    metrics = {name: type(METRICS[name].options).__name__ for name in METRIC_FIELDS}
    lines += [f"- [{cls}](#{cls.lower()}): `--{name}.NAME=VALUE`, of `evaluate`" for name, cls in metrics.items()]
    for cls, paths in groups.items():
        lines += ["", f"### {cls.__name__}", "", f"{summary(cls.__doc__)}. Written as {_written(paths)}.", ""]
        lines += _table(("field", "values", "default", "what it is"), map(_row, describe(cls)))
    for name in METRIC_FIELDS:
        cls = type(METRICS[name].options)
        about = f"{summary(cls.__doc__)}. Written as `--{name}.NAME=VALUE`, of `evaluate`."
        lines += ["", f"### {cls.__name__}", "", about, ""]
        lines += _table(("field", "values", "default", "what it is"), map(_row, describe(cls)))
    return "\n".join(lines) + "\n"


def anchor(title: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w-]", "", title.lower().replace(" ", "-"))


def _parsers(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, tuple[argparse.ArgumentParser, str]]]:
    """Yield the commands and verbs that can be run, each with its parser and the line that describes it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            about = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for verb, inner in action.choices.items():
                deeper = list(_parsers(inner, f"{name} {verb}"))
                yield from deeper or [(f"{name} {verb}", (inner, about[verb]))]


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    formatter = parser.formatter_class("")
    formatter.format_help()
    rows = []
    for action in parser._actions:
        if action.dest not in ("help", "quiet"):
            value = "" if action.nargs == 0 else f"={formatter._format_args(action, action.dest.upper())}"
            name = action.option_strings[0] + value if action.option_strings else action.metavar or action.dest
            rows.append((f"`{name}`", formatter._expand_help(action)))
    yield from _table(("option", "what it does"), rows)


def _row(field: FieldDoc) -> tuple[str, ...]:
    default = "" if field.groups and field.default else f"`{field.default!r}`"
    links = ", ".join(f"[{group.__name__}](#{group.__name__.lower()})" for group in field.groups)
    kind = re.sub(r"group(; name: .*)?", links, field.kind) if links else field.kind
    return f"`{field.name}`", kind, default, field.about


def _written(paths: Iterable[str]) -> str:
    return ", ".join(f"`{path}`" for path in paths)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
