"""The committed table of every array's axes is that of the code."""

import sys
from pathlib import Path

import pytest

from sora_jax.models.transformer import denoiser_specs
from sora_jax.nn.params import ParamSpec
from sora_jax.plan.shardings import parameter_table, rules_table

PLANS = Path(__file__).parents[1] / "experiments" / "plans"


@pytest.fixture(scope="module")
def page() -> str:
    sys.path.insert(0, str(PLANS))
    try:
        import write_shardings
    finally:
        sys.path.remove(str(PLANS))
    return write_shardings.page()


def test_the_committed_table_is_that_of_the_code(page):
    """Where a change of axes is meant: python experiments/plans/write_shardings.py, and commit what it wrote."""
    assert (PLANS / "sharding.md").read_text() == page


def test_every_parameter_of_the_model_has_a_line(page):
    import jax

    from sora_jax.config import load
    from sora_jax.kinds import run_config

    model = run_config(load(f"{PLANS.parents[1]}/configs/sora.py:3b")).model
    leaves = jax.tree.leaves(denoiser_specs(model), is_leaf=lambda x: isinstance(x, ParamSpec))
    section = page.split("## Transformer")[1].split("## ")[0]
    assert section.count("\n| ") - 1 == len(leaves)


def test_a_changed_axis_changes_the_table(monkeypatch):
    from sora_jax.parallel import rules

    spec = {"w": ParamSpec((8, 4), ("embed", "hidden"))}
    before = parameter_table(spec)
    assert before.endswith("| w | 8 x 4 | embed, hidden | fsdp, tensor |")
    monkeypatch.setitem(rules.RULES, "embed", ("data",))
    assert parameter_table(spec).endswith("| w | 8 x 4 | embed, hidden | data, tensor |")
    assert "| embed | data |" in rules_table()
