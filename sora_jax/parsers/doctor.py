"""Parse the command `doctor`: examine the machine or a run."""

import argparse

from sora_jax.config import check
from sora_jax.files import as_path
from sora_jax.parsers.base import add_json, make_parser

EXAMPLE = "examples:\n  sora-jax doctor\n  sora-jax doctor runs/video"


def add_doctor(commands) -> None:
    """Add the command `doctor`."""
    about = "examine the machine, or a run folder, and say what to do; writes nothing"
    p = make_parser(commands.add_parser, "doctor", help=about, epilog=EXAMPLE)
    about = "run folder: checkpoints, weights, losses, data, packs, gradients (default: the machine)"
    p.add_argument("run", metavar="RUN", nargs="?", type=as_path, help=about)
    add_json(p)
    p.set_defaults(function=doctor)


def doctor(options: argparse.Namespace) -> None:
    """Print the findings, each as soon as it is known; exit with code 1 if there is an error among them."""
    if options.run is not None:  # before seconds are spent on JAX
        from sora_jax.train.exported import no_run

        check((options.run / "config.json").exists(), no_run("RUN", options.run))
    import jax

    from sora_jax import console
    from sora_jax.doctor.finding import ERROR
    from sora_jax.parallel.settings import prepare_jax

    prepare_jax()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # what is compiled here is not kept
    if options.run is None:
        from sora_jax.doctor.machine import examine_machine

        findings = examine_machine()
    else:
        from sora_jax.doctor.run import examine_run

        findings = examine_run(options.run)
    found = []
    for finding in findings:
        found.append(finding)
        if not console.HABITS.json:
            print(finding, flush=True)
    if console.HABITS.json:
        console.result([finding._asdict() for finding in found], "")
    if any(finding.level == ERROR for finding in found):
        raise SystemExit(1)
