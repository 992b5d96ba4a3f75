"""The table of kinds of run. A new kind is one module with a `Kind`, and one line in `KINDS`."""

import sys
from collections.abc import Mapping

from sora_jax.config import choose, from_dict
from sora_jax.kinds.autoencoder import AUTOENCODER
from sora_jax.kinds.classifier import CLASSIFIER
from sora_jax.kinds.denoiser import DENOISER
from sora_jax.train.kind import Kind
from sora_jax.train.migrate import migrate_config, migrate_stored
from sora_jax.train.run_config import RunConfig

KINDS: dict[str, Kind] = {kind.name: kind for kind in (AUTOENCODER, DENOISER, CLASSIFIER)}


def kind_of(config: RunConfig) -> Kind:
    """Return the kind of a run."""
    return KINDS[config.kind]


def run_config(values: Mapping) -> RunConfig:
    """Build the validated config of a run from what a user gives; its `kind` says of which."""
    migrated = migrate_config(values)
    if migrated["kind"] != values.get("kind"):
        print(f"sora-jax: the kind {values['kind']!r} is called {migrated['kind']!r} now", file=sys.stderr)
    return _build(migrated, "--config")


def stored_config(values: Mapping) -> RunConfig:
    """Build the config that a run folder keeps, written by this or an earlier version."""
    return _build(migrate_stored(values), "config")


def _build(values: Mapping, where: str) -> RunConfig:
    kind = choose(f"{where}.kind", values.get("kind"), KINDS)
    return from_dict(kind.config, values, where, of=f" of kind {kind.name!r}")
