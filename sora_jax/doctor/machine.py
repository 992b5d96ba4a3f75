"""Examine the machine: versions, devices, memory, disk, extras, the cache of programs, codecs, and that it computes."""

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax import __version__
from sora_jax.doctor.finding import ERROR, OK, WARNING, Finding, guarded
from sora_jax.files import cache_folder, is_remote
from sora_jax.train.exported import USUAL, shipped_models
from sora_jax.train.provenance import commit, installed_version

GB = 1e9
LITTLE_MEMORY = 2 * GB  # the quickstart's peak is below it
LITTLE_DISK, NO_DISK = 5 * GB, 0.5 * GB
DECODERS = ("h264", "hevc", "vp9", "av1")
ENCODER = "libx264"  # of the mp4 files that are written
PLUGINS = {"tpu": "libtpu", "cuda13": "jax-cuda13-plugin"}  # by the extra of jax
MATMUL = 1024


def examine_machine() -> Iterator[Finding]:
    """Yield the findings, cheapest first."""
    checks = {
        "versions": _versions,
        "devices": _devices,
        "memory": _memory,
        "disk": _disk,
        "extras": _extras,
        "programs": _programs,
        "codecs": _codecs,
        "compute": _compute,
        "sample": _sample,
    }
    for topic, check in checks.items():
        yield from guarded(topic, check)


def _versions() -> Iterator[Finding]:
    code = commit()
    where = f", commit {code['commit'][:12]}{' with changes' * code['dirty']}" if code else ""
    names = ", ".join(f"{name} {installed_version(name)}" for name in ("jax", "jaxlib", "flax", "numpy"))
    yield Finding(OK, "versions", f"sora_jax {__version__}{where}, Python {platform.python_version()}, {names}")
    wrong = [text for requirement in _requirements()[""] if (text := _unmet(requirement))]
    for text in wrong:
        yield Finding(ERROR, "versions", text)
    if not wrong:
        yield Finding(OK, "versions", f"all {len(_requirements()[''])} packages that sora_jax needs are there")


def _requirements() -> dict[str, list[Any]]:
    """Return what sora_jax requires, by extra; "" is what it always needs."""
    from packaging.requirements import Requirement

    found: dict[str, list[Any]] = {"": []}
    for requirement in map(Requirement, importlib.metadata.requires("sora_jax") or ()):
        extra = str(requirement.marker).partition("extra == ")[2].strip("\"'") if requirement.marker else ""
        found.setdefault(extra, []).append(requirement)
    return found


def _unmet(requirement: Any) -> str:
    """Say why a requirement does not hold, and how to mend it; "" if it holds."""
    version = installed_version(requirement.name)
    if version and requirement.specifier.contains(version, prereleases=True):
        return ""
    wanted = f"'{requirement.name}{requirement.specifier}'"
    there = (
        f"{requirement.name} is {version}; it must be {requirement.specifier}" if version else f"no {requirement.name}"
    )
    return f"{there}: pip install {wanted}"


def _devices() -> Iterator[Finding]:
    devices = jax.devices()
    first = devices[0]
    limit = (first.memory_stats() or {}).get("bytes_limit") if first.platform != "cpu" else None
    each = f", {limit / GB:.1f} GB each" if limit else f", {os.cpu_count()} cores" if first.platform == "cpu" else ""
    yield Finding(OK, "devices", f"{len(devices)} x {first.device_kind} ({first.platform}{each})")
    if first.platform == "cpu" and Path("/dev/nvidia0").exists():
        yield Finding(WARNING, "devices", "there is an NVIDIA GPU, which JAX does not use: pip install 'jax[cuda13]'")


def _memory() -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        free = int(line.split()[1]) * 1024 if line.startswith("MemAvailable") else free
    text = f"{free / GB:.1f} of {total / GB:.1f} GB are free"
    little = free < LITTLE_MEMORY
    yield Finding(WARNING if little else OK, "memory", text + "; other programs should be closed" * little)


def _disk() -> Iterator[Finding]:
    for what, folder in (("the working folder", Path.cwd()), ("the cache folder", _existing(cache_folder()))):
        free = shutil.disk_usage(folder).free
        level = ERROR if free < NO_DISK else WARNING if free < LITTLE_DISK else OK
        text = f"{free / GB:.1f} GB are free in {what} {folder}"
        yield Finding(level, "disk", text + "; runs and data need room: remove files" * (level != OK))


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.parents) if each.exists())


def _extras() -> Iterator[Finding]:
    extras = {extra: list(map(_package, each)) for extra, each in _requirements().items() if extra}
    missing = {extra: [name for name in names if not installed_version(name)] for extra, names in extras.items()}
    there = ", ".join(extra for extra, names in missing.items() if not names)
    yield Finding(OK, "extras", f"installed: {there or 'none'}")
    if absent := [f"{extra} ({' '.join(names)})" for extra, names in missing.items() if names]:
        yield Finding(OK, "extras", f"not installed, with the packages for pip: {', '.join(absent)}")


def _package(requirement: Any) -> str:
    """Return the package that a requirement brings; of jax[tpu] the one that its extra does."""
    return next((PLUGINS[extra] for extra in requirement.extras if extra in PLUGINS), requirement.name)


def _programs() -> Iterator[Finding]:
    named = jax.config.values["jax_compilation_cache_dir"]
    if not named:
        mend = "each start compiles anew; set SORA_JAX_CACHE to a folder that can be written"
        yield Finding(WARNING, "programs", f"compiled programs are not kept: {mend}")
        return
    files = [] if is_remote(named) else [path.stat() for path in Path(named).glob("*-cache")]
    size = sum(file.st_size for file in files) / 1e6
    yield Finding(OK, "programs", f"{len(files)} compiled programs, {size:.0f} MB, are kept in {named}")


def _codecs() -> Iterator[Finding]:
    from av.codec import Codec, codecs_available

    missing = [name for name in DECODERS if name not in codecs_available and not _opens(Codec, name, "r")]
    text = f"PyAV reads {', '.join(name for name in DECODERS if name not in missing)}"
    absent = f", but not {', '.join(missing)}: such files are refused; pip install --upgrade av"
    yield Finding(WARNING if missing else OK, "codecs", text + absent * bool(missing))
    if not _opens(Codec, ENCODER, "w"):
        yield Finding(ERROR, "codecs", f"PyAV has no {ENCODER}: no mp4 can be written; pip install --upgrade av")


def _opens(codec: Any, name: str, mode: str) -> bool:
    try:
        return bool(codec(name, mode))
    except ValueError:
        return False


def _compute() -> Iterator[Finding]:
    a = np.random.default_rng(0).standard_normal((MATMUL, MATMUL), np.float32)
    multiply = jax.jit(lambda x: x @ x)
    found = np.asarray(multiply(a))
    error = np.abs(found - a.astype(np.float64) @ a).max() / np.abs(found).max()
    start, count = time.perf_counter(), 0
    x = jnp.asarray(a)
    while time.perf_counter() - start < 0.5:
        multiply(x).block_until_ready()
        count += 1
    rate = 2 * MATMUL**3 * count / (time.perf_counter() - start)
    good = error < 1e-2  # accelerators multiply in fewer bits
    text = f"a product of matrices is {'right' if good else 'wrong'} (error {error:.1e}), {rate / 1e9:,.0f} GFLOP/s"
    yield Finding(OK if good else ERROR, "compute", text + "; the driver or the device is at fault" * (not good))


def _sample() -> Iterator[Finding]:
    if USUAL not in shipped_models():
        return
    from sora_jax.generate.run import load_run

    start = time.perf_counter()
    run = load_run()
    preview = run.config.preview
    clip = run.generate(list(preview.prompts[:1]) or ["a red circle"], preview.sizes[0], steps=4)[0]
    sizes = "x".join(map(str, clip.shape[:3]))
    seconds = f"{time.perf_counter() - start:.1f} s, with loading and compilation"
    yield Finding(OK, "sample", f"model {USUAL} made a clip of {sizes} in {seconds}")
