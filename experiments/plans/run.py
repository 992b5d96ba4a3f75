"""Plan every config of configs/sora.py on hardware that it fits, and write the table of experiments/plans/README.md.

pip install libtpu 'jax[cuda13]'
python experiments/plans/run.py                all rows, two hours on two busy cores
python experiments/plans/run.py 3b 14b-slices  these alone; the table is made of all JSON files that are there
python experiments/plans/run.py --table        the table alone
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GIB = 2**30
FLOPS = "--topology=v5e:2x2 --config.mesh.fsdp=4 --config.batch=4 --pack-length=1024 --config.model.attention=dense"
PLANS = {
    "tiny": "--config=configs/sora.py:tiny --topology=v5e:2x2",
    "s": "--config=configs/sora.py:s --topology=v5e:4x4",
    "b": "--config=configs/sora.py:b --topology=v5e:4x4",
    "l": "--config=configs/sora.py:l --topology=v5e:4x4",
    "xl": "--config=configs/sora.py:xl --topology=v6e:16x16",
    "3b": "--config=configs/sora.py:3b --topology=v5p:4x4x4",
    "14b-slices": "--config=configs/sora.py:14b --topology=v5p:4x4x8 --slices=2",
    "3b-sample": "--config=configs/sora.py:3b --topology=v5p:2x2x2 --what=sample",
    "reconstruct": "--config=configs/autoencoder.py:base --topology=v5e:2x2 --what=autoencoder"
    " --config.mesh.sequence=2",
    "b-unfit": "--config=configs/sora.py:b --topology=v5e:2x2 --config.mesh.fsdp=4 --config.batch=4"
    " --config.model.remat=none --pack-length=16384",
    "s-none": "--config=configs/sora.py:s --topology=v5e:4x4 --config.model.remat=none",
    "s-dots": "--config=configs/sora.py:s --topology=v5e:4x4 --config.model.remat=dots",
    "s-full": "--config=configs/sora.py:s --topology=v5e:4x4 --config.model.remat=full",
    "b-h100": "--config=configs/sora.py:b --topology=h100:8 --config.model.attention=cudnn",
    "3b-h100": "--config=configs/sora.py:3b --topology=h100:8 --slices=4 --config.model.attention=cudnn"
    " --config.batch=32 --pack-length=16384",
    "flops-none": f"--config=configs/sora.py:b {FLOPS} --config.model.remat=none",
    "flops-full": f"--config=configs/sora.py:b {FLOPS} --config.model.remat=full",
}
HEAD = (
    "| plan | command after `sora-jax plan` | fits: GiB of a chip | compiled / model FLOPs | binds | step at best | "
    "utilisation: overlapped, serial | compiled in | commit |\n|---|---|---|---|---|---|---|---|---|"
)
REMAT = {"s-none": "none", "s-dots": "dots", "s": "attention", "s-full": "full"}
REMAT_HEAD = (
    "| remat | kept by the forward pass, GiB | all of a chip, GiB | compiled / model FLOPs | compute, memory: ms | "
    "step at best, nothing overlapped: ms |\n|---|---|---|---|---|---|"
)


def plan(name: str) -> None:
    """Run one plan and keep its JSON, with the command and the time it took."""
    command = [sys.executable, "-m", "sora_jax.cli", "plan", *PLANS[name].split(), "--json"]
    began = time.time()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    head = subprocess.run(
        ["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = {"command": f"sora-jax plan {PLANS[name]}", "commit": head.stdout.strip()}
    found |= {"seconds": round(time.time() - began)} | json.loads(done.stdout)
    (HERE / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def row(name: str) -> str:
    """Return a line of the table."""
    p = json.loads((HERE / f"{name}.json").read_text())
    memory = f"{'yes' if p['fits'] else 'no'}: {p['needed'] / GIB:.2f} of {p['usable'] / GIB:.2f}"
    cells = [f"[{name}]({name}.json)", f"`{PLANS[name]}`", memory]
    if p["fits"]:
        best = max(p["times"].values())
        share = f"{p['utilisation_overlapped']:.0%}, {p['utilisation_serial']:.0%}"
        cells += [f"{p['flops_over_model_flops']:.3f}", p["binding"], f"{best:.3g} s", share]
    else:
        cells += ["", "", "", p["suggestion"]]
    return f"| {' | '.join([*cells, str(p['seconds']) + ' s', p['commit']])} |"


def remat_row(name: str) -> str:
    """Return a line of the table of remat policies."""
    p = json.loads((HERE / f"{name}.json").read_text())
    times = {cause: 1e3 * seconds for cause, seconds in p["times"].items()}
    kept = p["memory"]["activations"] / GIB
    cells = [f'"{REMAT[name]}"', f"{kept:.2f}", f"{p['needed'] / GIB:.2f}", f"{p['flops_over_model_flops']:.3f}"]
    cells += [f"{times['compute']:.0f}, {times['memory']:.0f}", f"{max(times.values()):.0f}, {sum(times.values()):.0f}"]
    return f"| {' | '.join(cells)} |"


def write_tables() -> None:
    """Put the rows of all plans that were run between the marks of the README."""
    there = [name for name in PLANS if (HERE / f"{name}.json").exists()]
    _between("table", [HEAD, *map(row, there)])
    if set(REMAT) <= set(there):
        _between("remat", [REMAT_HEAD, *map(remat_row, REMAT)])


def _between(mark: str, lines: list[str]) -> None:
    readme = HERE / "README.md"
    before, rest = readme.read_text().split(f"<!-- {mark} -->")
    after = rest.split(f"<!-- end of {mark} -->")[1]
    readme.write_text("\n".join([before + f"<!-- {mark} -->", *lines, f"<!-- end of {mark} -->" + after]))


def main(arguments: list[str]) -> None:
    for name in [] if "--table" in arguments else arguments or PLANS:
        print(f"{name}: {PLANS[name]}", flush=True)
        plan(name)
        write_tables()
    write_tables()


if __name__ == "__main__":
    main(sys.argv[1:])
