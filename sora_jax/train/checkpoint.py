"""Checkpoints by Orbax: asynchronous, complete or absent; the only file that imports orbax."""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax import serialization

from sora_jax.config import check
from sora_jax.errors import UserError
from sora_jax.train.state import TrainState

STATE, EMA, RUN = "state", "ema", "run"

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of every option that reading alone implies


class Checkpoints:
    """The checkpoints of a run folder; a context manager, because leaving without closing loses the last save.

    With `keep=None` it only reads, and may do so while another process trains in the same folder.
    """

    def __init__(self, folder: Path, keep: int | None = None):
        if keep is None:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options, item_names=(STATE, EMA, RUN))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with _one_sentence(f"a checkpoint could not be saved in {self._manager.directory}"):
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    def latest(self) -> int | None:
        """The newest complete step."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, run: dict) -> None:
        """Starts saving in the background; `run` (config, data position) is kept beside the arrays as JSON.

        UserError if there is no room for it, or if the save before this one has failed.
        """
        if self.latest() == step:
            return
        _check_room(self._manager.directory, sum(x.nbytes for x in jax.tree.leaves(state)))
        tree = serialization.to_state_dict(state)
        ema = tree.pop("ema")
        items = {
            STATE: ocp.args.StandardSave(tree),
            EMA: ocp.args.StandardSave(ema),
            RUN: ocp.args.JsonSave(run),
        }
        with _one_sentence(f"a checkpoint could not be saved in {self._manager.directory}"):
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, state: TrainState) -> tuple[TrainState, dict]:
        """The newest checkpoint in the structure and shardings of `state`, and what was saved as `run`."""
        tree = serialization.to_state_dict(state)
        ema = tree.pop("ema")
        found = self._restore(**{STATE: _like(tree), EMA: _like(ema), RUN: ocp.args.JsonRestore()})
        return serialization.from_state_dict(state, found[STATE] | {"ema": found[EMA]}), found[RUN]

    def restore_ema(self, params, averages: int, index: int = 0):
        """One of the `averages` alone, in the structure and shardings of the abstract tree `params`."""
        like = serialization.to_state_dict((params,) * averages)
        found = self._restore(**{EMA: _like(like)})
        return serialization.from_state_dict(params, found[EMA][str(index)])

    def _restore(self, **items):
        step = self.latest()
        with _one_sentence(f"checkpoint {step} in {self._manager.directory} is damaged or of another model"):
            return self._manager.restore(step, args=ocp.args.Composite(**items))


@contextlib.contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Orbax tells of what it cannot read or write by errors of many lines and types."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{what}: {reason}") from error


def _check_room(folder: Path, wanted: int) -> None:
    # Asked first: a disk that fills up during a save ends in a flood of messages from the library's threads.
    free = shutil.disk_usage(folder).free
    check(
        free > 1.1 * wanted,
        f"the disk of {folder} has {free / 1e6:.0f} MB left; a checkpoint needs {wanted / 1e6:.0f} MB",
    )


def _like(tree):
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    return ocp.args.StandardRestore(abstract)
