"""Hold what all parsers share: their help, and options that several commands have."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn

from sora_jax.config import did_you_mean
from sora_jax.errors import UserError

EXAMPLES = """\
examples:
  sora-jax quickstart                                   a text-to-video model from scratch, in about ten minutes
  sora-jax data build --path=clips --out=data/clips --max-frames=9 --multiple=8 --max-pixels=384
  sora-jax train --config=configs/tiny.py:autoencoder --workdir=runs/autoencoder --config.data=data/clips
  sora-jax data encode --autoencoder=runs/autoencoder --data=data/clips --out=data/latents
  sora-jax train --config=configs/tiny.py --workdir=runs/video --config.latents=data/latents
  sora-jax sample --workdir=runs/video --prompt="a fox runs" --frames=9 --height=16 --width=24 --out=fox.gif
  sora-jax data inspect data/clips
"""
CONFIG = "config file, see `sora-jax configs`; with --help: list its fields; --config.a.b=VALUE changes one"
INVALID = re.compile(r"argument (?P<option>\S+): invalid (?P<kind>int|float) value: (?P<value>.*)", re.DOTALL)
NUMBERS = {"int": "a whole number", "float": "a number"}


class Help(argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of examples, and show the default of each option that has one."""

    defaults: Mapping[str, object] = {}  # by option; they replace those of the parser

    def _get_help_string(self, action):
        default = self.defaults.get(action.dest, action.default)
        hidden = isinstance(default, bool) or default in (None, "", [], (), argparse.SUPPRESS)
        return action.help if hidden else f"{action.help} (default: {default})"


class Parser(argparse.ArgumentParser):
    """Name the nearest command or option where one is mistyped."""

    commands: Mapping[str, argparse.ArgumentParser] = {}
    fields: Callable[[Sequence[str]], str] = staticmethod(lambda words: "")
    """Return the fields of the config that the words of a command name, as text behind its help."""
    named: Callable[[Sequence[str], str], Iterable[str]] = staticmethod(lambda words, name: ())
    """Return the options for the fields of that config that have a name."""
    words: Sequence[str] = ()

    def add_subparsers(self, **options):
        """Add commands, and remember them by name."""
        action = super().add_subparsers(**options)
        self.commands = action.choices
        return action

    def parse_known_args(self, args=None, namespace=None):
        """Parse what is known, after a look at the name of the command; the rest is returned beside it."""
        self.words = list(args or ())
        word = next(iter(self.words), "-")
        if self.commands and not word.startswith("-") and word not in self.commands:
            near = did_you_mean(word, self.commands)
            self.error(f"{word!r} is not a command of {self.prog}; allowed: {', '.join(self.commands)}{near}")
        return super().parse_known_args(args, namespace)

    def print_help(self, file=None) -> None:
        """Print the help and, where the words name a config, its fields."""
        super().print_help(file)
        print(end=self.fields(self.words), file=file)

    def error(self, message: str) -> NoReturn:
        """End with a message and where the usage is; a required option that is missing may be one that is mistyped."""
        if found := INVALID.fullmatch(message):
            raise UserError(f"{found['option']} is {found['value']}; it must be {NUMBERS[found['kind']]}")
        if message.startswith("the following arguments are required"):
            typed = [word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")]
            unknown = [word for word in typed if word not in self._option_string_actions and "." not in word]
            message += "".join(self._near(word, ()) for word in unknown)
        self.exit(2, f"sora-jax: {message}; see {self.prog} --help\n")

    def _near(self, word: str, more: Sequence[str]) -> str:
        """Return the option that is nearest to a word, as a question; `more`: options that the help does not list."""
        known = re.findall(r"^ +(?:-h, )?(--[a-z-]+)", self.format_help(), re.MULTILINE)
        return did_you_mean(word, [*known, *more][1:])  # the first one is --help

    def refuse(self, words: Sequence[str], more: Sequence[str]) -> None:
        """End with the nearest option to the first word; `more`: options that the help does not list."""
        typed = words[0].split("=")[0]
        fields = list(self.named(self.words, typed.lstrip("-").replace("-", "_"))) if typed.startswith("--") else []
        near = f"; did you mean {' or '.join(fields)}?" if fields else self._near(typed, more)
        if not typed.startswith("-") and "--prompt" in self._option_string_actions:
            near = f'; did you mean --prompt="{" ".join(words)}"?'
        self.error(f"unrecognized arguments: {' '.join(words)}{near}")


def make_parser(make, *names, formatter_class=Help, **options) -> Parser:
    """Make a parser by `make`, which does not take abbreviations of options."""
    parser = make(*names, formatter_class=formatter_class, allow_abbrev=False, **options)
    parser.set_defaults(parser=parser)  # the innermost one wins: its options are those to suggest
    about = "print results, warnings and errors alone: no progress bars, no notes"
    parser.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help=about)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option that makes a result JSON."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and all else to stderr")


def add_tiles(parser) -> None:
    """Add the options for tiles."""
    about = "process clips by one program in chunks and tiles of this size, in pixels; 0: all; encode takes auto, too"
    parser.add_argument("--tile", default="", metavar="FRAMESxHEIGHTxWIDTH", help=about)
    about = "overlap of tiles, as a fraction of a tile, where they are not exact"
    parser.add_argument("--tile-overlap", type=float, default=0.25, help=about)
