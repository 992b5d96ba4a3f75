"""Read configs that earlier versions wrote, as this version has them."""

from collections.abc import Mapping
from typing import Any

from sora_jax.diffusion.sampling import SamplingConfig

KINDS = {"transformer": "denoiser"}  # renamed kinds of run


def migrate_config(values: Mapping) -> dict:
    """Return the config of a run, as a mapping, in the form of this version.

    In version 0.1.0 the kind of a denoiser's run was "transformer", and models had no name. Before that, previews had a
    number of steps and a guidance of their own.
    """
    kind: Any = values.get("kind")
    config: dict[str, Any] = dict(values) | {"kind": KINDS.get(kind, kind)}
    if config.get("model") is not None:
        config["model"] = migrate_model(config["model"])
    return config | _migrate_preview(config)


def migrate_model(values: Mapping) -> dict:
    """Return the config of a model, as a mapping, with the name that tells its class."""
    known = {"multipliers": "causal", "widths": "kl", "heads": "transformer"}  # a field that the others do not have
    name = next((name for field, name in known.items() if field in values), None)
    return {"name": name} | dict(values) if name else dict(values)


def _migrate_preview(values: Mapping) -> dict:
    preview = dict(values.get("preview", {}))
    if "guidance" not in preview and not isinstance(preview.get("steps"), int):
        return {}
    scale = preview.pop("guidance", SamplingConfig().guidance.scale)
    preview["steps"] = str(preview.get("steps", ""))
    return {"preview": preview, "sampling": {"guidance": {"scale": scale}}}
