"""List the files of a directory or a bucket, with the members of the zip and tar files in it as files below them."""

import io
import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from sora_jax.config import check
from sora_jax.data.reading.tracks import reason
from sora_jax.data.sources.opened import Part, ZipMember, archive_copy, open_zip
from sora_jax.data.sources.tables import READERS
from sora_jax.files import as_path, is_remote, matching, remote_files, size_and_time

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_ZIP_BYTES = 2**28  # members of a zip are read whole
MAX_TAR_BYTES = 2**31
MAX_HEADER_BYTES = 2**20


class Listed(NamedTuple):
    """A file of `size` bytes; in an archive (its name) it is `member`."""

    size: int
    archive: str = ""
    member: Part | ZipMember | None = None


@dataclass
class Listing:
    """Files by name relative to `root`, in the order of clips, and pairs (name, reason) of what is not listed."""

    root: Path
    files: dict[str, Listed] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)
    only: str = ""  # "NAME/" of the one file whose clips are wanted; the others hold their captions

    def media(self, name: str) -> Path | Part | ZipMember:
        return self.files[name].member or self.root / name

    def add(self, archive: str, name: str, why: str, listed: Listed) -> None:
        """List a member of an archive, or refuse it for the reason `why`."""
        inside = posixpath.normpath(name.replace("\\", "/"))  # some tar files begin all names with "./"
        path = PureWindowsPath(name)  # knows both kinds of slashes
        if why or path.root or path.drive or ".." in path.parts:
            self.refused.append((f"{archive}/{name}", why or "unsafe: the name leads out of the archive"))
        elif f"{archive}/{inside}" in self.files:
            self.refused.append((f"{archive}/{name}", "repeated: an earlier file of the archive has the same name"))
        elif visible(inside):
            self.files[f"{archive}/{inside}"] = listed


def list_files(path: str, shards: bool) -> Listing:
    """List a directory, a single file or the files that match a pattern; of `shards`, the tar files only.

    Raises:
        UserError: there is no such file.
    """
    archive_copy.cache_clear()  # a tar may have changed since it was last listed
    root = as_path(path)
    listing = Listing(root)
    if root.is_dir():
        found = dict(sorted(remote_files(root).items(), key=_walked) if is_remote(root) else _walk(listing))
        found = {name: size for name, size in found.items() if visible(name)}
    else:
        if root.is_file():
            clip = root.suffix.lower() not in READERS
            check(clip, f"--path is {path}; it must be the folder of the clips, not their table")
            listing.root, listing.only, stem = root.parent, f"{root.name}/", f"{root.stem}."
            near = [f for f in root.parent.iterdir() if f.suffix.lower() in READERS or f.name.startswith(stem)]
            near = [f for f in near if visible(f.name) and not f.name.lower().endswith((".zip", ".tar", *COMPRESSED))]
            files = sorted({root, *(file for file in near if file.is_file())})
        else:
            listing.root = next(above for above in root.parents if not set("*?[") & set(str(above)))
            files = sorted(file for file in matching(path) if file.is_file()) if shards else []
        found = {file.relative_to(listing.root).as_posix(): size_and_time(file)[0] for file in files}
    for name, size in _without_datasets(path, found).items():
        lower = name.lower()
        if lower.endswith(COMPRESSED):
            listing.refused.append((name, "compressed: such a tar has no random access; unpack it to a plain .tar"))
        elif lower.endswith(".tar"):
            _list_tar(listing, name)
        elif lower.endswith(".zip") and not shards:
            _list_zip(listing, name)
        elif not shards:
            listing.files[name] = Listed(size)
    what = "a tar file, a folder of tar files or a pattern with * and ?" if shards else "a folder of videos or pictures"
    exists = listing.files or listing.refused or (root.is_dir() and not shards)
    check(exists, f"--path is {path}; it must be {what}")
    return listing


def visible(name: str) -> bool:
    """Return True if no part of a name is hidden, as `.DS_Store` and `__MACOSX` are."""
    return not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _walk(listing: Listing) -> Iterator[tuple[str, int]]:
    """Yield name and size of the files below the root, sorted, those of a folder before the folders in it."""

    def refuse(path: str | Path, why: str) -> None:
        listing.refused.append((os.path.relpath(path, listing.root), why))

    def skip(error: OSError) -> None:
        refuse(error.filename, f"unreadable: {reason(error)}")

    for folder, folders, files in os.walk(listing.root, onerror=skip):
        folders[:] = sorted(filter(visible, folders))
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for path in sorted(Path(folder, name) for name in files + links if visible(name)):
            try:
                size, plain = path.stat().st_size, path.is_file()
            except OSError as error:
                refuse(path, "missing: a link to nothing" if path.is_symlink() else f"unreadable: {reason(error)}")
                continue
            if plain:
                yield path.relative_to(listing.root).as_posix(), size
            else:  # a pipe would be waited for without end
                what = "a link to a folder" if path.is_dir() else "a pipe, a socket or a device"
                refuse(path, f"not a file: {what}, which is not followed")


def _walked(found: tuple[str, int]) -> list[tuple[bool, str]]:
    """Sort the names of a bucket as `_walk` does."""
    *folders, file = found[0].split("/")
    return [*((True, folder) for folder in folders), (False, file)]


def _without_datasets(path: str, found: dict[str, int]) -> dict[str, int]:
    """Leave out datasets and latent caches, so that `--out` may lie in `--path`."""
    names = [name.rpartition("/") for name in found]
    made = {folder for folder, _, file in names if file in ("dataset.json", "cache.json")}
    made &= {folder for folder, _, file in names if file.endswith(".array_record")}
    check("" not in made, f"--path is {path}; it is a dataset, which needs --source=array_record")
    inside = tuple(f"{folder}/" for folder in made)
    return {name: size for name, size in found.items() if not name.startswith(inside)} if made else found


def _list_zip(listing: Listing, name: str) -> None:
    path = listing.root / name
    try:
        members = sorted(open_zip(path).infolist(), key=lambda member: member.filename)
    except Exception as error:  # zipfile raises one of many types
        listing.refused.append((name, f"unreadable: {reason(error)}"))
        return
    for member in members:
        if not member.is_dir():
            size = member.file_size
            why = f"too large: {size} bytes; a member of a zip may have {MAX_ZIP_BYTES}" if size > MAX_ZIP_BYTES else ""
            listing.add(name, member.filename, why, Listed(size, name, ZipMember(path, member)))


def _list_tar(listing: Listing, name: str) -> None:
    """List the members of a tar by its headers alone; a damaged one, up to the damage."""
    path, at = listing.root / name, -1
    copy = archive_copy(path)  # outside of `try`: a file that cannot be downloaded is not damaged
    size = copy.stat().st_size
    try:
        with _Headers(copy) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                if not at < info.offset < tar.offset or info.size < 0:  # a negative size would lead back, for ever
                    raise tarfile.ReadError(f"the header at byte {info.offset} leads back")
                at = info.offset
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all, and a shard may hold millions
                if not info.isdir():
                    part = Listed(info.size, name, Part(path, info.offset_data, info.size))
                    listing.add(name, info.name, _refuse(info, size), part)
            file.seek(min(tar.offset, size))
            rest = file.read(MAX_HEADER_BYTES)
            if len(rest) < tarfile.BLOCKSIZE or any(rest):  # tarfile takes a damaged header for the end
                listing.refused.append((name, f"damaged: no end mark at byte {tar.offset}; what follows is not read"))
    except Exception as error:  # tarfile raises whatever its parts do
        listing.refused.append((name, f"damaged: {reason(error)}"))


class _Headers(io.FileIO):
    """Lets tarfile read headers and nothing longer, whatever size a header claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return super().read(size)


def _refuse(info: tarfile.TarInfo, size: int) -> str:
    if not info.isreg() or info.issparse():
        return "unsafe: a link, a device or a sparse file, not a plain one"
    if info.size > MAX_TAR_BYTES:
        return f"too large: {info.size} bytes; a member of a tar may have {MAX_TAR_BYTES}"
    return "damaged: the tar ends inside of it" if info.offset_data + info.size > size else ""
