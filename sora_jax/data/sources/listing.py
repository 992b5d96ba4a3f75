"""List the files of a directory or a bucket, with the members of the zip and tar files in it as files below them."""

import io
import os
import posixpath
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sora_jax.config import check
from sora_jax.data.reading.tracks import reason
from sora_jax.data.sources.entries import escapes
from sora_jax.data.sources.opened import Part, ZipMember, archive_copy, open_zip
from sora_jax.files import as_path, is_remote, matching, remote_files, size_and_time

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_ZIP_BYTES = 2**28  # members of a zip are read whole
MAX_TAR_BYTES = 2**31
MAX_HEADER_BYTES = 2**20
BESIDE = (".txt", ".json")  # read with a path of a single file


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

    def media(self, name: str) -> Path | Part | ZipMember:
        return self.files[name].member or self.root / name

    def add(self, archive: str, name: str, why: str, listed: Listed) -> None:
        """List a member of an archive, or refuse it for the reason `why`."""
        inside = posixpath.normpath(name.replace("\\", "/"))  # some tar files begin all names with "./"
        if why or escapes(name):
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
    elif root.is_file():
        listing.root = root.parent
        texts = [text for ending in BESIDE if (text := root.with_suffix(ending)).is_file()]
        found = {file.name: size_and_time(file)[0] for file in dict.fromkeys((root, *texts))}
    else:
        listing.root = _fixed_part(root)
        files = [file for file in matching(path) if file.is_file()] if shards else []
        found = {file.relative_to(listing.root).as_posix(): size_and_time(file)[0] for file in sorted(files)}
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

    def skip(error: OSError) -> None:
        listing.refused.append((os.path.relpath(error.filename, listing.root), f"unreadable: {reason(error)}"))

    for folder, folders, files in os.walk(listing.root, onerror=skip):
        folders[:] = sorted(filter(visible, folders))
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for file in sorted(filter(visible, files + links)):
            path = Path(folder, file)
            name = path.relative_to(listing.root).as_posix()
            try:
                status = path.stat()
            except OSError as error:
                why = "missing: a link to nothing" if path.is_symlink() else f"unreadable: {reason(error)}"
                listing.refused.append((name, why))
                continue
            if stat.S_ISREG(status.st_mode):  # a pipe would be waited for without end
                yield name, status.st_size
            else:
                what = "a link to a folder" if file in links else "a pipe, a socket or a device"
                listing.refused.append((name, f"not a file: {what}, which is not followed"))


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


def _fixed_part(pattern: Path) -> Path:
    """Return the folder above the first part with a wildcard."""
    parts = pattern.parts
    fixed = next((n for n, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts) - 1)
    return pattern.parents[len(parts) - 1 - fixed]


def _list_zip(listing: Listing, name: str) -> None:
    path = listing.root / name
    try:
        members = sorted(open_zip(path).infolist(), key=lambda member: member.filename)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        listing.refused.append((name, f"unreadable: {reason(error)}"))
        return
    for member in members:
        if not member.is_dir():
            size = member.file_size
            why = f"too large: {size} bytes; a member of a zip may have {MAX_ZIP_BYTES}" if size > MAX_ZIP_BYTES else ""
            listing.add(name, member.filename, why, Listed(size, name, ZipMember(path, member.filename)))


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
