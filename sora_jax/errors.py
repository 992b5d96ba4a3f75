"""How the package ends early: a mistake that the user can mend, and an orderly stop."""


class UserError(Exception):
    """A user's mistake: one sentence naming the option, the value given and what is allowed.

    The command line prints it without a traceback and ends with its exit code; library callers may catch it.
    """

    code = 2


class LostPeer(UserError):
    """Another process of the run has died; code 75 (EX_TEMPFAIL of sysexits.h) tells schedulers to start all again."""

    code = 75


class Unreachable(UserError):
    """The store that a run is kept in does not answer; code 75, as a restart may find that it does again."""

    code = 75


class Stopped(Exception):
    """A run was asked to stop (Ctrl-C, SIGTERM); everything up to `step` is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}; everything is saved, the same command goes on from there")
        self.step = step
