"""List how every array of a run is laid out on the mesh, one line each, with its logical axes."""

import jax
from jax.sharding import PartitionSpec

from sora_jax.data.packing.packs import PackingConfig
from sora_jax.models.denoiser import DenoiserConfig, denoiser_specs
from sora_jax.models.first_stage import FirstStageConfig, autoencoder_specs
from sora_jax.nn.params import ParamSpec
from sora_jax.parallel.rules import AUTOENCODER, RULES, SHARED, TRANSFORMER, partition
from sora_jax.plan.denoiser import full_pack
from sora_jax.train.denoiser import DenoiserRun

HEAD = "| array | shape | logical axes | mesh axes |\n|---|---|---|---|"


def rules_table() -> str:
    """Return the table logical axis -> mesh axes, with the networks that use it."""
    tables = {"all": SHARED, "transformer": TRANSFORMER, "autoencoder": AUTOENCODER}
    rows = (f"| {name} | {' '.join(RULES[name]) or '-'} | {of} |" for of, table in tables.items() for name in table)
    return "\n".join(["| logical axis | mesh axes | of |", "|---|---|---|", *rows])


def parameter_table(specs: dict) -> str:
    """List every parameter; gradient, optimizer moments and averages are laid out as it is."""
    rows: list[str] = []

    def visit(path, spec: ParamSpec):
        name = "/".join(str(getattr(entry, "key", getattr(entry, "idx", entry))) for entry in path)
        rows.append(_row(name, spec.shape, spec.axes))

    jax.tree_util.tree_map_with_path(visit, specs, is_leaf=lambda x: isinstance(x, ParamSpec))
    return "\n".join([HEAD, *rows])


def batch_table(model: DenoiserConfig, packing: PackingConfig) -> str:
    """List every array of a batch of packs, as the loop places it; the model splits the length itself."""
    batch = full_pack(DenoiserRun(model=model, packing=packing))
    rows = (_row(name, x.shape, ("batch", *(None,) * (x.ndim - 1))) for name, x in sorted(batch.items()))
    return "\n".join([HEAD, *rows])


def _row(name: str, shape: tuple[int, ...], axes: tuple) -> str:
    spec: PartitionSpec = partition(*axes)
    placed = (" ".join(entry) if isinstance(entry, tuple) else entry or "-" for entry in spec)
    cells = [name, " x ".join(map(str, shape)), ", ".join(axis or "-" for axis in axes), ", ".join(placed)]
    return f"| {' | '.join(cells)} |"


def shardings(model: DenoiserConfig, packing: PackingConfig, autoencoders: dict[str, FirstStageConfig]) -> str:
    """Return the page: rules, transformer, batch and autoencoders."""
    parts = {"Rules": rules_table(), "Transformer": parameter_table(denoiser_specs(model))}
    parts["Batch of the transformer"] = batch_table(model, packing)
    parts |= {name: parameter_table(autoencoder_specs(config)) for name, config in autoencoders.items()}
    return "\n\n".join(f"## {title}\n\n{table}" for title, table in parts.items()) + "\n"
