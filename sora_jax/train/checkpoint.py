"""Checkpoints by Orbax: asynchronous, complete or absent; the only file that imports orbax."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax import serialization

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
        try:
            self._manager.wait_until_finished()
        finally:
            self._manager.close()

    def latest(self) -> int | None:
        """The newest complete step."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, run: dict) -> None:
        """Starts saving in the background; `run` (config, data position) is kept beside the arrays as JSON."""
        if self.latest() == step:
            return
        tree = serialization.to_state_dict(state)
        ema = tree.pop("ema")
        items = {
            STATE: ocp.args.StandardSave(tree),
            EMA: ocp.args.StandardSave(ema),
            RUN: ocp.args.JsonSave(run),
        }
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
        with _one_sentence(self._manager.directory, step):
            return self._manager.restore(step, args=ocp.args.Composite(**items))


@contextlib.contextmanager
def _one_sentence(folder: Path, step: int | None) -> Iterator[None]:
    """Orbax tells of a checkpoint that does not fit, or cannot be read, by errors of many lines and types."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"checkpoint {step} in {folder} is damaged or of another model: {reason}") from error


def _like(tree):
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    return ocp.args.StandardRestore(abstract)

