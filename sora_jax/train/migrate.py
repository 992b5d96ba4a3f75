"""Read configs that version 0.1.0 and earlier wrote, as this version has them."""

from collections.abc import Mapping
from typing import Any

from sora_jax.diffusion.sampling import SamplingConfig

KINDS = {"transformer": "denoiser"}  # renamed kinds of run
SHARED = {"latent_channels", "l1_weight", "l2_weight", "kl_weight", "remat", "dtype"}
CAUSAL = {"time_factor", "space_factor", "patch", "width", "multipliers", "encoder_blocks", "decoder_blocks", "kernels"}
AUTOENCODERS = {"causal": CAUSAL | SHARED, "kl": {"widths", "blocks", "groups", "quant"} | SHARED}


def migrate_config(values: Mapping) -> dict:
    """Return a config that a user gives, as a mapping, in the form of this version.

    In version 0.1.0 the kind of a denoiser's run was "transformer", and models had no name.
    """
    migrated = dict(values)
    kind = values.get("kind")
    migrated["kind"] = KINDS.get(kind, kind) if isinstance(kind, str) else kind
    if hasattr(values.get("model"), "items"):
        rename = {"autoencoder": migrate_autoencoder, "denoiser": _migrate_denoiser}.get(
            str(migrated.get("kind")), dict
        )
        migrated["model"] = rename(values["model"])
    return migrated


def migrate_stored(values: Mapping) -> dict:
    """Return a config that a run folder keeps, as a mapping, in the form of this version.

    Before version 0.1.0, previews had a number of steps and a guidance of their own.
    """
    migrated = migrate_config(values)
    preview = dict(values.get("preview", {}))
    if "guidance" not in preview and not isinstance(preview.get("steps"), int):
        return migrated
    scale = preview.pop("guidance", SamplingConfig().guidance.scale)
    preview["steps"] = str(preview.get("steps", ""))
    return migrated | {"preview": preview, "sampling": {"guidance": {"scale": scale}}}


def migrate_autoencoder(values: Mapping) -> dict:
    """Return the config of an autoencoder, as a mapping, with the name that tells its class.

    Version 0.1.0 took the first class that has all the fields.
    """
    fitting = (name for name, fields in AUTOENCODERS.items() if fields.issuperset(values))
    return {"name": next(fitting, "causal")} | dict(values)


def _migrate_denoiser(values: Mapping) -> dict[str, Any]:
    return {"name": "transformer"} | dict(values)


MODELS = {"autoencoder": migrate_autoencoder, "denoiser": _migrate_denoiser}
