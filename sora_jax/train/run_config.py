"""The base of the configs of all kinds of run."""

import dataclasses
from typing import Any

from sora_jax.config import check
from sora_jax.data.feeding.feed import FeedConfig
from sora_jax.parallel.mesh import MeshConfig
from sora_jax.train.adapt import InitConfig
from sora_jax.train.loop import LoopConfig
from sora_jax.train.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Configure a training run; a kind of run adds its own fields, and a `kind` of its own.

    Annotate the kind as `kind: Literal["name"] = "name"`, so that files with another are refused.
    """

    kind: str = ""  # kind of run
    seed: int = 0  # of all random draws, from 0 to 4294967295
    batch: int = 8  # rows of a step over all devices, gradient accumulation included
    split: str = "train"  # the split of the data that is trained on
    model: Any = None  # the network, by a config of its own
    init: InitConfig = InitConfig()  # the weights that a new run begins with
    freeze: tuple[str, ...] = ()  # paths of parameters that are not trained, such as "text"; needs init.weights
    optim: OptimConfig = OptimConfig()
    loop: LoopConfig = LoopConfig()
    feed: FeedConfig = FeedConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check(0 <= self.seed < 2**32, f"seed is {self.seed}; it must be from 0 to 4294967295")
        each = self.loop.accumulate
        check(
            self.batch > 0 and self.batch % each == 0,
            f"batch is {self.batch}; it must be a positive multiple of loop.accumulate = {each}",
        )
