"""Checkpoints by Orbax: asynchronous, complete or absent; the only file that imports orbax."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax import serialization

from sora_jax.errors import UserError
from sora_jax.train.state import TrainState

STATE, EMA, RUN = "state", "ema", "run"


class Checkpoints:
    """The checkpoints of a run folder; a context manager, because leaving without closing loses the last save."""

    def __init__(self, folder: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options, item_names=(STATE, EMA, RUN))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.wait_until_finished()
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
        args = {STATE: _restore_like(tree), EMA: _restore_like(ema), RUN: ocp.args.JsonRestore()}
        try:
            found = self._manager.restore(self.latest(), args=ocp.args.Composite(**args))
        except ValueError as error:
            raise UserError(f"the checkpoint in {self._manager.directory} is of another model: {error}") from error
        return serialization.from_state_dict(state, found[STATE] | {"ema": found[EMA]}), found[RUN]

    def restore_ema(self, params, averages: int, index: int = 0):
        """One of the `averages` alone, in the structure and shardings of the abstract tree `params`."""
        like = serialization.to_state_dict((params,) * averages)
        found = self._manager.restore(self.latest(), args=ocp.args.Composite(**{EMA: _restore_like(like)}))
        return serialization.from_state_dict(params, found[EMA][str(index)])


def _restore_like(tree):
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    return ocp.args.StandardRestore(abstract)

