"""Define the exceptions that end a command without a traceback: mistakes of the user, and orderly stops."""


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
