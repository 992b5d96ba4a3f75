"""`data build` as an Apache Beam pipeline: the same functions and the same folder, made by a cluster's workers.

An element of the pipeline is a part of the dataset (`parts.py`); a worker opens the sources, makes the part and writes
it into the unfinished folder, which all workers see. A part that a worker lost is made again by another; nothing else
is shared. When the pipeline is through, the parts are joined here.
"""

import os
import shlex
from functools import lru_cache

from sora_jax.data.building.build import build_options, built_before, check_not_empty, count_parts, finish, make_parts
from sora_jax.data.building.prepare import BuildConfig, Mix, open_sources
from sora_jax.data.storing.manifest import KIND, Dataset
from sora_jax.data.storing.parts import ShardedWriter, start
from sora_jax.errors import UserError


def build_with_beam(config: BuildConfig, options: str = "") -> Dataset:
    """`build.build`, its parts made by a Beam runner.

    options: of the pipeline, as on a command line, such as "--runner=DataflowRunner --project=P --region=R"; without a
    runner it is the direct one, on this machine. The paths of the sources and `config.out` must be of `gs://`, or on a
    file system that all workers mount. Raises UserError where Beam is not installed, and as `build` does.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("--beam needs Apache Beam: pip install 'sora_jax[beam]'") from error
    mix = open_sources(config)
    if (made := built_before(config, mix)) is not None:
        return made
    check_not_empty(config, mix)
    parts = start(config.out, KIND, {"options": build_options(config, mix)}, count_parts(config, mix))
    try:
        with beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
            numbers = pipeline | "parts" >> beam.Create(parts.missing()) | beam.Reshuffle()
            _ = numbers | "make" >> beam.Map(_make, config, parts)
    except Exception as error:  # a runner wraps what its workers raise in one of many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--beam={options!r} ended early, the same command goes on: {reason}") from error
    return finish(parts, config, mix)


def _make(part: int, config: BuildConfig, parts: ShardedWriter) -> None:
    if parts.is_made(part):  # by a worker that was thought lost
        return
    make_parts(config, _sources(config, os.getpid()), parts, [part], progress=False)


@lru_cache(maxsize=1)
def _sources(config: BuildConfig, process: int) -> Mix:
    """The sources, listed once in each process."""
    return open_sources(config)
