"""Write experiments/plans/sharding.md: the axes of every array of a run; a test compares it with the code.

python experiments/plans/write_shardings.py
"""

from pathlib import Path

from sora_jax.config import load
from sora_jax.kinds import run_config
from sora_jax.plan.shardings import shardings

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
INTRODUCTION = """\
# Every array and its axes

Written by `python experiments/plans/write_shardings.py`, compared with the code in tests/test_sharding_table.py.
Shapes are those of `configs/sora.py:3b` and of the autoencoders of `configs/autoencoder.py`. Gradients, both moments
of the optimizer and the averages of the parameters lie as the parameters do.
"""


def page() -> str:
    """Return the whole page."""
    run = run_config(load(f"{CONFIGS}/sora.py:3b"))
    names = {"Autoencoder, configs/autoencoder.py:base": "base", "Autoencoder, configs/autoencoder.py:kl4": "kl4"}
    models = {title: run_config(load(f"{CONFIGS}/autoencoder.py:{name}")).model for title, name in names.items()}
    return f"{INTRODUCTION}\n{shardings(run.model, run.packing, models)}"


if __name__ == "__main__":
    (HERE / "sharding.md").write_text(page())
