"""Run `data build` as an Apache Beam pipeline: the same functions make the same folder on a cluster's workers.

An element of the pipeline is the number of a part of the dataset (`parts.py`). A worker opens the sources, makes the
part and writes it into the unfinished folder, which all workers see; a part that a worker lost is made by another.
"""

import os
import shlex
from functools import lru_cache

from sora_jax.data.building.build import build, make_parts
from sora_jax.data.building.prepare import BuildConfig, Mix, open_sources
from sora_jax.data.storing.manifest import Dataset
from sora_jax.data.storing.parts import ShardedWriter
from sora_jax.errors import UserError, install_command


def build_with_beam(config: BuildConfig, options: str = "") -> Dataset | None:
    """Build a dataset as `build.build` does, its parts made by a Beam runner.

    The paths of the sources and `config.out` must be of `gs://`, or on a file system that all workers mount.

    Args:
        config: options of the build.
        options: options of the pipeline, such as "--runner=DataflowRunner --project=P"; "": the runner of this machine.

    Raises:
        UserError: Beam is not installed, or `build` raises it.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(f"--beam needs Apache Beam: {install_command('beam')}") from error

    def make(config: BuildConfig, mix: Mix, parts: ShardedWriter, numbers: list[int], progress: bool) -> None:
        try:
            with beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
                elements = pipeline | "parts" >> beam.Create(numbers) | beam.Reshuffle()
                _ = elements | "make" >> beam.Map(_make, config, parts)
        except Exception as error:  # a runner wraps what its workers raise in one of many types
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"--beam is {options!r}; it ended early, the same command resumes: {reason}") from error

    return build(config, progress=False, make=make)


def _make(part: int, config: BuildConfig, parts: ShardedWriter) -> None:
    if not parts.is_made(part):  # by a worker that was thought lost
        make_parts(config, _sources(config, os.getpid()), parts, [part])


@lru_cache(maxsize=1)
def _sources(config: BuildConfig, process: int) -> Mix:
    """Open the sources, once in each process."""
    return open_sources(config)
