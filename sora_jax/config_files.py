"""Find the config files that come with the package, from any folder and however it was installed."""

import importlib.metadata
import site
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from sora_jax.config import check, did_you_mean
from sora_jax.errors import CHECKOUT, UserError

SHARED = Path("share", "sora_jax", "configs")  # below an installation's data folder, see setup.cfg


def find_config(file: str) -> str:
    """Return `file` (a path, with :VARIANT or without) with the path of the file that exists.

    Looks in the working folder, then for `configs/NAME.py` among the files that came with the package.

    Raises:
        UserError: there is no such file.
    """
    path, colon, variant = file.partition(":")
    if Path(path).is_file():
        return file
    folder, relative = package_configs(), Path(path)
    own = relative.parent == Path("configs") and folder is not None and (folder / relative.name).is_file()
    if own and folder is not None:
        return f"{folder / relative.name}{colon}{variant}"
    names = [f"configs/{there.name}" for there in sorted(folder.glob("*.py"))] if folder else []
    known = f"those of the package, in {folder}, are {', '.join(names)}" if names else "the package came without any"
    near = did_you_mean(path, names)
    raise UserError(f"--config is {file!r}; there is no file {path!r} in {Path.cwd()}; {known}{near}")


def package_config(name: str) -> Path:
    """Return a config file that came with the package; UserError where there is none."""
    folder = package_configs()
    check(folder and (folder / name).is_file(), f"configs/{name} was not found; name a file by --config")
    assert folder is not None
    return folder / name


def package_configs() -> Path | None:
    """Return the folder of the config files that came with the package."""
    return next((folder for folder in _folders() if folder.is_dir()), None)


def _folders() -> Iterator[Path]:
    if (CHECKOUT / "setup.cfg").is_file():  # a checkout
        yield CHECKOUT / "configs"
    try:  # the installation's own list, whatever its scheme
        for file in importlib.metadata.files("sora_jax") or ():
            if file.parts[-4:-1] == SHARED.parts:
                yield Path(str(file.locate())).resolve().parent
                break
    except importlib.metadata.PackageNotFoundError:
        pass
    yield CHECKOUT / SHARED  # `pip install --target` moves the files after it has made that list
    for data in (sysconfig.get_path("data"), site.getuserbase()):
        yield Path(data) / SHARED
