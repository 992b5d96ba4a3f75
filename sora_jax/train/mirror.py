"""Keep files that grow, such as metrics, in an object store, where files cannot grow."""

import shutil
import sys
import time
from pathlib import Path
from types import TracebackType

from sora_jax.errors import UserError
from sora_jax.files import as_user_error, is_remote, replacing, size_and_time, temporary_folder

FLUSH_INTERVAL = 10.0  # seconds, at least, between two uploads of a mirror
FLUSH_SHARE = 20  # a mirror spends at most 1 / FLUSH_SHARE of a run's time on uploads


class Mirror:
    """Local folder for files that grow, uploaded to a remote folder now and then; a local folder is used in place.

    `flush_if_due` uploads changed files at most every ten seconds and for at most a twentieth of the time; `flush`, and
    the end of the context, upload at once. A failed upload is reported once and repeated later; only that at the end of
    the context raises UserError. A killed process loses what it wrote after its last upload.
    """

    def __init__(self, folder: Path):
        self._target = folder
        self._uploaded: dict[Path, tuple[int, str]] = {}  # size and time of each file when it was uploaded
        self._due = 0.0  # of the clock `time.monotonic`
        self._failing = False
        self.folder = folder
        if is_remote(folder):
            with as_user_error(str(folder)):
                self.folder = temporary_folder()

    def __enter__(self) -> "Mirror":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder == self._target:
            return
        try:
            if kind:  # a second error, of the upload, must not hide the one that ends the context
                self.flush()
            else:
                self._upload("*")
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def flush_if_due(self) -> None:
        """Upload the files that changed since the last upload, unless that was a moment ago."""
        start = time.monotonic()
        if start >= self._due:
            self.flush()
            now = time.monotonic()
            self._due = now + max(FLUSH_INTERVAL, FLUSH_SHARE * (now - start))

    def flush(self, pattern: str = "*") -> None:
        """Upload now the files that changed since the last upload and whose names match the pattern."""
        if self.folder == self._target:
            return
        try:
            self._upload(pattern)
            self._failing = False
        except UserError as error:
            if not self._failing:
                print(f"sora-jax: {error} The upload is repeated now and then.", file=sys.stderr)
            self._failing = True

    def _upload(self, pattern: str) -> None:
        for file in sorted(file for file in self.folder.rglob(pattern) if file.is_file()):
            if self._uploaded.get(file) != (version := size_and_time(file)):
                target = self._target / file.relative_to(self.folder).as_posix()
                with replacing(target) as temporary:
                    shutil.copyfile(file, temporary)  # `replacing` deletes what it uploads; this file goes on growing
                self._uploaded[file] = version
