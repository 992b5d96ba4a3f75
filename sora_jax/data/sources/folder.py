"""Folders of videos and pictures, and WebDataset shards, as a source: media files with their captions."""

import hashlib
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import PurePath

from sora_jax.data.reading.tracks import reason
from sora_jax.data.sources.config import SourceConfig
from sora_jax.data.sources.entries import Entry
from sora_jax.data.sources.listing import Listing, list_files
from sora_jax.data.sources.opened import FileMedia, open_file
from sora_jax.data.sources.tables import READERS, Annotations, Fields, Row, clean, json_row, merge, number_labels, usual
from sora_jax.errors import UserError
from sora_jax.files import is_remote, local_copy, read_together

# What people and programs keep beside clips; everything else is tried, and listed with a reason if it is no media.
NOT_MEDIA = {
    *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".cls"),
    *(".md", ".html", ".pdf", ".py", ".xmp", ".aae", ".db", ".ini"),
}
SAMPLE_MEDIA = (  # of WebDataset samples, which hold anything else, too
    *(".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".3gp", ".wmv", ".flv", ".gif"),
    *(".webp", ".png", ".jpg", ".jpeg", ".avif", ".heic", ".heif", ".bmp", ".tif", ".tiff"),
)
MAX_TEXT_BYTES = 2**20


class FolderReader:
    """Every video and picture below a folder, in sorted order, and in the zip and tar files there.

    Captions come from files beside a clip: `fox.txt` (kind original), `fox.KIND.txt`, `fox.json` (a record, see
    `tables.py`) and `fox.cls` (the class) for `fox.mp4`; and from tables in its folder or above, whose files are
    relative to the table. A deeper table goes before one above it, a file beside before both, each for its own kinds.

    In WebDataset shards the files that share their name up to the first dot are a sample, with one media file.
    """

    def __init__(self, config: SourceConfig):
        shards = config.name == "webdataset"
        self._listing = listing = list_files(config.path, shards)
        files = {name: _stem(name) for name in listing.files if _ending(name) not in NOT_MEDIA}
        clips = _samples(listing, config.media_field) if shards else files
        fields = Fields(usual(config.caption_field), usual(config.label_field))
        captions = Captions(listing, clips, fields, strict=shards)
        found = {name: captions.find(name) for name in clips if f"{name}/".startswith(listing.only)}
        listing.refused += [(name, given.problem) for name, given in found.items() if given.problem]
        for name, table in captions.unused.items():
            outside = name.startswith(("/", "../")) or ":/" in name
            why = "outside: named in {}, but not below --path" if outside else "missing: named in {} but not there"
            if f"{name}/".startswith(listing.only):
                listing.refused.append((name, captions.rows[name].problem or why.format(table)))
        used = {name: given for name, given in found.items() if not given.problem}
        labels = number_labels(given.label for given in used.values())
        self.classes = {(name or str(number), number) for number, name in labels if number is not None}
        self._entries = [
            Entry(name, given.captions, *label, given.split) for (name, given), label in zip(used.items(), labels)
        ]
        self.refused = [(_printable(name), _printable(why)) for name, why in listing.refused]
        sizes = [listing.files[entry.file].size for entry in self._entries]
        text = repr((self._entries, sizes, self.refused))
        self.digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, index: int) -> Entry:
        return self._entries[index]

    def open(self, index: int) -> FileMedia:
        return FileMedia(self._listing.media(self._entries[index].file))


class Captions:
    """Captions, labels and splits of the clips of a listing.

    clips: file name -> key, which the files beside a clip share. strict: JSON beside a clip must be a record.
    `rows`: file -> annotations; `unused`: file -> table of the rows that no clip has asked for yet.
    """

    def __init__(self, listing: Listing, clips: Mapping[str, str], fields: Fields, strict: bool):
        self._listing, self._clips, self._fields, self._strict = listing, clips, fields, strict
        root, keys = listing.root, set(clips.values())
        roots = [root] if is_remote(root) else [root.absolute(), root.resolve()]
        self._roots = [f"{form(str(path))}/" for path in roots for form in (str, normal)]
        forms = Counter(map(normal, listing.files))
        self._twins = {name for name in listing.files if forms[normal(name)] > 1}  # which need their exact names
        self.rows: dict[str, Annotations] = {}
        self.unused: dict[str, str] = {}
        tables = [name for name in listing.files if _may_be_table(name, keys)]
        for name in sorted(tables, key=lambda name: (name.count("/"), name)):  # one nearer to a clip comes later
            self._read_table(name)
        self._beside = _beside(listing.files, keys.union(map(normal, clips)))
        texts = {name: listing.files[name] for beside in self._beside.values() for _, name in beside}
        small = [name for name, file in texts.items() if file.size <= MAX_TEXT_BYTES and not file.archive]
        # One after the other, a million texts of a bucket would take a night.
        self._read_before = read_together(root, small) if is_remote(root) else {}

    def find(self, name: str) -> Annotations:
        """Return the annotations of a clip."""
        parts = []
        for key in reversed(self._row_keys(name)):
            self.unused.pop(key, None)
            parts += [self.rows[key]] if key in self.rows else []
        keys = dict.fromkeys((self._clips[name], normal(name)))
        beside = [pair for key in keys for pair in self._beside.get(key, ())]
        beside.sort(key=lambda pair: (_ending(pair[1]) == ".txt", not pair[0]))
        try:
            name.encode()
            return merge(parts + [self._read_beside(file, kind or "original") for kind, file in beside])
        except UserError:
            raise
        except Exception as error:  # a damaged archive raises one of many types
            return Annotations(problem=f"bad name or caption: {reason(error)}")

    def _row_keys(self, name: str) -> list[str]:
        """Return the names that a clip may have in tables; in an archive, also that as if unpacked beside it."""
        names, archive = [name if name in self._twins else normal(name)], self._listing.files[name].archive
        if archive:
            names.append(normal(posixpath.join(posixpath.dirname(archive), name.removeprefix(f"{archive}/"))))
        return [key for full in names for key in (full, _stem(full))]

    def _read_beside(self, name: str, kind: str) -> Annotations:
        text, ending = self._text(name), _ending(name)
        if ending == ".txt":
            return Annotations({kind: clean(text)})
        row = Row(1, {self._fields.label or "label": text}) if ending == ".cls" else json_row(1, text)
        if row.problem and not self._strict:
            return Annotations()  # beside files of a folder JSON is used for much else
        found = row.annotations(self._fields)
        return replace(found, problem=found.problem and f"bad row: {name}: {found.problem}")

    def _text(self, name: str) -> str:
        data = self._read_before.get(name)
        if data is None:
            with open_file(self._listing.media(name)) as stream:
                data = stream.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise ValueError(f"{name} has more than {MAX_TEXT_BYTES} bytes")
        return data.decode("utf-8-sig")

    def _read_table(self, name: str) -> None:
        """Take the rows of a table of clips, refuse another file; UserError if a table, or captions.*, is unusable."""
        certain = posixpath.basename(_stem(name)).lower() == "captions" and _ending(name) != ".json"
        media = self._listing.media(name)
        try:
            with open_file(local_copy(media) if isinstance(media, PurePath) else media) as stream:
                table = READERS[_ending(name)](stream, self._fields)
                wrong = table.problem(self._fields)
                certain = certain or not wrong
                for row in () if wrong else table.rows:
                    self._take(name, row)
        except UserError:
            raise
        except Exception as error:  # pyarrow, csv, json and archives raise one of many types
            wrong = " ".join(str(error).split()) or type(error).__name__
        if wrong and certain:
            raise UserError(f"{self._listing.root / name} cannot be used: {wrong}")
        if wrong:
            self._listing.refused.append((name, f"no table: {wrong}"))

    def _take(self, table: str, row: Row) -> None:
        where, file, found = f"bad row: {table}, row {row.number}", row.file(), row.annotations(self._fields)
        problem = found.problem
        if not file:
            self._listing.refused.append((table, f"{where}: {problem or 'it names no file'}"))
            return
        key = self._key(table, file)
        if self.unused.get(key) == table:
            problem = f"it names {file} again; a file has one row, with columns caption_KIND"
        found = replace(found, problem=problem and f"{where}: {problem}")
        self.unused[key], self.rows[key] = table, merge((self.rows.get(key, Annotations()), found))

    def _key(self, table: str, file: str) -> str:
        """Return the name, relative to the root, of a file in a table."""
        for name in (file.replace("\\", "/"), normal(file)):
            root = next(filter(name.startswith, self._roots), "")
            key = name.removeprefix(root) if root else posixpath.join(posixpath.dirname(table), name)
            if (key := posixpath.normpath(key)) in self._twins:
                return key
        return normal(key)


def normal(name: str) -> str:
    """Return a name with slashes and composed letters: macOS decomposes them on the disk, tables compose them."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()  # names that are not UTF-8


def _ending(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _stem(name: str) -> str:
    return posixpath.splitext(normal(name))[0]


def _may_be_table(name: str, keys: set[str]) -> bool:
    """Return True for files with the ending of a table; JSON, which is read whole, must have a usual name, too."""
    ending, stem = _ending(name), _stem(name)
    usual_name = posixpath.basename(stem).lower().startswith(("captions", "meta"))
    return ending in READERS and (ending != ".json" or usual_name and stem not in keys)


def _beside(names: Iterable[str], keys: set[str]) -> dict[str, list[tuple[str, str]]]:
    """Return pairs (kind, file) of the texts and records beside clips by key, the longest that fits; "" is no kind."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name in reversed(list(names)):
        key, ending, kind = _stem(name), _ending(name), ""
        if ending not in (".txt", ".json", ".cls"):
            continue
        while key not in keys and "." in posixpath.basename(key):
            key, _, more = key.rpartition(".")
            kind = f"{more}.{kind}" if kind else more
        if key in keys and (ending == ".txt" or not kind):
            found.setdefault(key, []).append((kind, name))
    return found


def _samples(listing: Listing, ending: str) -> dict[str, str]:
    """Group the files of shards by their name up to the first dot; return the group of each media file.

    A group must have one, that of the ending if one is given; any other is refused.
    """
    groups: dict[str, list[str]] = {}
    for name in listing.files:
        groups.setdefault(_sample(name), []).append(name)
    clips, known = {}, {_sample(name) for name, _ in listing.refused}
    endings = (f".{ending.lstrip('.')}",) if ending else SAMPLE_MEDIA
    for key, names in groups.items():
        media = [name for name in names if name.lower().endswith(endings)]
        exact = [name for name in media if normal(name) == key + endings[0]] if ending else []
        if len(exact or media) == 1:
            clips[(exact or media)[0]] = key
        elif media:
            why = f"several media: {', '.join(media)}; --media-field is the ending of the one to take"
            listing.refused.append((key, why))
        elif key not in known and not all(_may_be_table(name, set()) for name in names):  # those are listed elsewhere
            listing.refused.append((key, f"no media: only {', '.join(names)}"))
    return clips


def _sample(name: str) -> str:
    folder, base = posixpath.split(normal(name))
    return posixpath.join(folder, base.partition(".")[0])
