"""Parse `sora-jax completion`: print a script that completes commands and options in a shell."""

import argparse
from collections.abc import Callable

from sora_jax.config import check_word
from sora_jax.errors import UserError
from sora_jax.parsers.base import make_parser

SHELLS = ("bash", "zsh", "fish", "tcsh")


def add_completion(commands, whole: Callable[[], argparse.ArgumentParser]) -> None:
    """Add the command `completion`; `whole` makes the parser of the command line."""
    example = (
        "examples:\n"
        "  sora-jax completion bash     > ~/.local/share/bash-completion/completions/sora-jax\n"
        "  sora-jax completion zsh      > ~/.zfunc/_sora-jax, where ~/.zfunc is in $fpath\n"
        "  sora-jax completion fish     > ~/.config/fish/completions/sora-jax.fish"
    )
    about = "print a script that completes commands and options in a shell"
    p = make_parser(commands.add_parser, "completion", help=about, epilog=example)
    p.add_argument("shell", metavar="SHELL", nargs="?", default="", help=", ".join(SHELLS))
    p.set_defaults(function=lambda options: print(script(whole(), options.shell)))


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script for a shell."""
    if not shell:
        raise UserError(f"SHELL is not given; it must be {', '.join(SHELLS[:-1])} or {SHELLS[-1]}")
    check_word("SHELL", shell, SHELLS)
    try:
        import shtab
    except ImportError as error:  # a checkout that is newer than its environment
        raise UserError("completion needs shtab, which is not installed: pip install shtab") from error
    return shtab.complete(parser, shell)
