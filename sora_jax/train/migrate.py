"""Configs that earlier versions wrote, as this version reads them."""

from collections.abc import Mapping

from sora_jax.diffusion.sampling import SamplingConfig

KINDS = {"transformer": "denoiser"}  # renamed kinds of run


def migrate_config(values: Mapping) -> dict:
    """Return the config of a run, as a nested dict, in the form of this version.

    Since 0.1.0 the kind of a denoiser's run is called so, and models have a name. Before, previews had a number of
    steps and a guidance of their own.
    """
    values = dict(values) | {"kind": KINDS.get(values.get("kind"), values.get("kind"))}
    if values["kind"] == "autoencoder" and "model" in values:
        values |= {"model": migrate_first_stage(values["model"])}
    if values["kind"] == "denoiser":
        values |= {"model": {"name": "transformer"} | dict(values["model"])} if "model" in values else {}
        values |= _migrate_preview(values)
    return values


def migrate_first_stage(values: Mapping) -> dict:
    """Return the config of an autoencoder, as a dict, with the name that tells its class."""
    return {"name": "causal" if "multipliers" in values else "kl"} | dict(values)


def _migrate_preview(values: Mapping) -> dict:
    preview = dict(values.get("preview", {}))
    if "guidance" not in preview and not isinstance(preview.get("steps"), int):
        return {}
    scale = preview.pop("guidance", SamplingConfig().guidance.scale)
    preview["steps"] = str(preview.get("steps", ""))
    return {"preview": preview, "sampling": {"guidance": {"scale": scale}}}
