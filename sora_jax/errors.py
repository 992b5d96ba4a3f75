"""Define the exceptions that end a command without a traceback: mistakes of the user, and orderly stops."""

import importlib.metadata
import re
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]  # where the package is one; else the folder that it is installed in


class UserError(Exception):
    """Report a user's mistake in one sentence that names the option, its value and what is allowed.

    The command line prints it without a traceback and ends with its exit code; library callers may catch it.
    """

    code = 2


class NotFinite(UserError):
    """Report values that are NaN or infinite, and what they are of."""


class LostPeer(UserError):
    """Report that another process of the run died.

    The exit code 75 (EX_TEMPFAIL of sysexits.h) tells schedulers to restart all processes.
    """

    code = 75


class Unreachable(UserError):
    """Report that the object store of a run does not answer. The exit code is 75, as a restart may succeed."""

    code = 75


class Stopped(Exception):
    """Report that a run stopped on request (Ctrl-C, SIGTERM) and saved everything up to `step`.

    hint: what else can be done then.
    """

    def __init__(self, step: int, hint: str = "") -> None:
        super().__init__(f"stopped at step {step}; everything is saved, the same command goes on from there{hint}")
        self.step = step


def install_command(extra: str) -> str:
    """Return the command that installs an extra: that of the checkout, or the packages that an installation names."""
    if (CHECKOUT / "setup.cfg").is_file():
        return f"pip install -e '{CHECKOUT}[{extra}]'"
    marker = re.compile(rf"(.+?)\s*;\s*extra == ['\"]{re.escape(extra)}['\"]")
    try:
        known = importlib.metadata.requires("sora_jax") or ()
    except importlib.metadata.PackageNotFoundError:  # a copied folder
        return f"the packages of the extra {extra!r} in setup.cfg"
    return " ".join(["pip install", *(repr(found[1]) for entry in known if (found := marker.fullmatch(entry)))])
