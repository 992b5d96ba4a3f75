"""A bucket, `gs://bucket`, on this machine: a server for TensorStore, which has a client of its own, and a file system
of fsspec for everything else. A test file imports the fixture `bucket`.

Both know what object stores know: whole objects, each with a generation; no folders, no renaming, no appending.
"""

import io
import json
import os
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import uuid4

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem

from sora_jax import files

LOCK = threading.RLock()


class Objects:
    """Objects by name, BUCKET/KEY; that each is a file of a local folder is for the tests to look at."""

    def __init__(self, root: Path):
        self.root = root

    def upload(self, folder: Path, name: str) -> str:
        """The files below a local folder as objects below gs://bucket/NAME, which is returned."""
        shutil.copytree(folder, self.root / "bucket" / name)
        return f"gs://bucket/{name}"

    def read(self, name: str) -> tuple[bytes, int]:
        """(bytes, generation); FileNotFoundError."""
        with LOCK:
            path = self.root / name
            if not path.is_file():
                raise FileNotFoundError(name)
            return path.read_bytes(), path.stat().st_mtime_ns

    def write(self, name: str, data: bytes, generation: str | None = None) -> int:
        """The new generation; FileExistsError unless the object is of the generation named ("0": is not there)."""
        with LOCK:
            path = self.root / name
            before = path.stat().st_mtime_ns if path.is_file() else 0
            if generation is not None and int(generation) != before:
                raise FileExistsError(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.root / uuid4().hex
            temporary.write_bytes(data)
            new = max(before + 1, temporary.stat().st_mtime_ns)
            os.utime(temporary, ns=(new, new))
            temporary.rename(path)
            return new

    def delete(self, name: str) -> None:
        """FileNotFoundError where it is not."""
        with LOCK:
            path = self.root / name
            path.unlink()
            for folder in path.parents:  # there are no folders, so no empty ones
                if folder == self.root or any(folder.iterdir()):
                    break
                folder.rmdir()

    def below(self, prefix: str) -> dict[str, tuple[int, int]]:
        """Name -> (size, generation) of the objects whose names begin so, in order."""
        with LOCK:
            walked = os.walk(self.root / prefix.rpartition("/")[0])
            found = [Path(folder, name) for folder, _, names in walked for name in names]
            named = {path.relative_to(self.root).as_posix(): path.stat() for path in found}
        return {n: (s.st_size, s.st_mtime_ns) for n, s in sorted(named.items()) if n.startswith(prefix)}


class Handler(BaseHTTPRequestHandler):
    """As much of the JSON API of Google Cloud Storage as TensorStore asks for."""

    protocol_version = "HTTP/1.1"
    objects: Objects

    def answer(self, status: int, body=b"", **headers) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def asked(self) -> tuple[str, str, dict[str, str]]:
        """(bucket, key, options)."""
        url = urlsplit(self.path)
        bucket, _, key = url.path.partition("/b/")[2].partition("/o")
        return bucket, unquote(key.removeprefix("/")), {n: v[0] for n, v in parse_qs(url.query).items()}

    def do_GET(self):
        bucket, key, options = self.asked()
        if not key:
            return self.answer(200, self.listing(bucket, options))
        try:
            data, generation = self.objects.read(f"{bucket}/{key}")
        except FileNotFoundError:
            return self.answer(404)
        if options.get("ifGenerationNotMatch") == str(generation):
            return self.answer(304)
        if options.get("ifGenerationMatch", str(generation)) != str(generation):
            return self.answer(412)
        first, last = self.span(len(data))
        place = {"content_range": f"bytes {first}-{last}/{len(data)}"} if "range" in self.headers else {}
        self.answer(206 if place else 200, data[first : last + 1], x_goog_generation=generation, **place)

    def span(self, size: int) -> tuple[int, int]:
        first, _, last = self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
        return (int(first), min(int(last or size), size - 1)) if first else (max(0, size - int(last)), size - 1)

    def listing(self, bucket: str, options: dict[str, str]) -> dict:
        prefix, items, prefixes = options.get("prefix", ""), [], set()
        low, high = options.get("startOffset", ""), options.get("endOffset", chr(sys.maxunicode))
        for name, (size, generation) in self.objects.below(f"{bucket}/{prefix}").items():
            key = name.removeprefix(f"{bucket}/")
            folder, slash, _ = key.removeprefix(prefix).partition("/")
            if slash and "delimiter" in options:
                prefixes.add(f"{prefix}{folder}/")
            elif low <= key < high:
                items.append({"name": key, "size": str(size), "generation": str(generation)})
        return {"items": items, "prefixes": sorted(prefixes)}

    def do_POST(self):
        bucket, _, options = self.asked()
        data = self.rfile.read(int(self.headers["content-length"]))
        try:
            new = self.objects.write(f"{bucket}/{options['name']}", data, options.get("ifGenerationMatch"))
        except FileExistsError:
            return self.answer(412)
        self.answer(200, {"name": options["name"], "size": str(len(data)), "generation": str(new)})

    def do_DELETE(self):
        bucket, key, options = self.asked()
        try:
            _, generation = self.objects.read(f"{bucket}/{key}")
            if options.get("ifGenerationMatch", str(generation)) != str(generation):
                return self.answer(412)
            self.objects.delete(f"{bucket}/{key}")
        except FileNotFoundError:
            return self.answer(404)
        self.answer(204)

    def log_message(self, *_):
        pass


class BucketFileSystem(AbstractFileSystem):
    """`gs://` for fsspec. `objects` is of the class: fsspec makes the instances."""

    protocol = ("gcs", "gs")
    objects: Objects

    def info(self, path, **_):
        name = self._strip_protocol(path)
        found = self.objects.below(name)
        if name in found:
            size, generation = found[name]
            return {"name": name, "size": size, "type": "file", "mtime": generation / 1e9}
        if "/" not in name or any(other.startswith(f"{name}/") for other in found):
            return {"name": name, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **_):
        name = self._strip_protocol(path)
        inside = self.objects.below(f"{name}/")
        names = sorted({f"{name}/{other[len(name) + 1 :].partition('/')[0]}" for other in inside}) or [name]
        found = [self.info(one) for one in names]
        return found if detail else names

    def _open(self, path, mode="rb", **_):
        if mode not in ("rb", "wb"):
            raise NotImplementedError(f"objects are written whole, not in mode {mode!r}")
        name = self._strip_protocol(path)
        return io.BytesIO(self.objects.read(name)[0]) if mode == "rb" else _Upload(self.objects, name)

    def pipe_file(self, path, value, mode="overwrite", **_):
        self.objects.write(self._strip_protocol(path), value, "0" if mode == "create" else None)

    def cp_file(self, path1, path2, **_):
        if self.isfile(path1):
            self.objects.write(self._strip_protocol(path2), self.objects.read(self._strip_protocol(path1))[0])

    def _rm(self, path):
        if self.isfile(path):
            self.objects.delete(self._strip_protocol(path))

    def mkdir(self, path, create_parents=True, **_):
        pass

    def makedirs(self, path, exist_ok=False):
        pass


class _Upload(io.BytesIO):
    """Becomes an object when it is closed."""

    def __init__(self, objects: Objects, name: str):
        super().__init__()
        self._objects, self._name = objects, name

    def close(self):
        if not self.closed:
            self._objects.write(self._name, self.getvalue())
        super().close()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The `Objects` of gs://, empty."""
    objects = Handler.objects = BucketFileSystem.objects = Objects(tmp_path_factory.mktemp("gs"))
    (objects.root / "bucket").mkdir()
    cache = tmp_path_factory.mktemp("cache")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in BucketFileSystem.protocol:
            fsspec.register_implementation(name, BucketFileSystem, clobber=True)
        # Orbax asks Google's own client whether the bucket is one with folders.
        plain = SimpleNamespace(hierarchical_namespace_enabled=False)
        client = ModuleType("google.cloud.storage")
        client.Client = lambda: SimpleNamespace(get_bucket=lambda name: plain)
        for name in ("google", "google.cloud"):
            patch.setitem(sys.modules, name, sys.modules.get(name) or ModuleType(name))
        patch.setitem(sys.modules, "google.cloud.storage", client)
        patch.setattr(sys.modules["google.cloud"], "storage", client, raising=False)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        patch.setattr(files, "cache_folder", lambda: cache)
        yield objects
    server.shutdown()
    server.server_close()
