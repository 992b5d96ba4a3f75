"""Tokenize captions without a download: word pieces learnt from the captions, or plain bytes."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sora_jax.config import check
from sora_jax.errors import UserError
from sora_jax.files import as_path, read_text, write_json

NULL, UNKNOWN = 1, 2  # 0 is padding; NULL is the caption of "no caption", which guidance compares with
_SPECIAL = ["<pad>", "<null>", "<unk>"]
_KINDS = ("words", "bytes")


@dataclass(frozen=True)
class TokenizerConfig:
    """Rules by which captions become ids."""

    kind: str = "words"  # "words": pieces learnt from the captions; "bytes": UTF-8, nothing to learn
    vocab: int = 2048  # ids at most, with the three reserved ones; of words only
    max_tokens: int = 64  # longer captions are cut

    def __post_init__(self) -> None:
        check(self.kind in _KINDS, f"tokenizer.kind is {self.kind!r}; it must be {' or '.join(map(repr, _KINDS))}")
        check(self.vocab >= 16, f"tokenizer.vocab is {self.vocab}; it must be at least 16")
        check(self.max_tokens >= 1, f"tokenizer.max_tokens is {self.max_tokens}; it must be at least 1")


@dataclass(frozen=True)
class Reading:
    """A text as a model reads it.

    tokens: of the whole text, of which the first `most` are read. unknown: the words with an unknown piece, which are
    all the same to the model. spelt: False where nothing but punctuation is known.
    """

    text: str
    tokens: int
    most: int
    unknown: tuple[str, ...] = ()
    spelt: bool = True

    @property
    def is_cut(self) -> bool:
        """Return True if the end of the text is not read."""
        return self.tokens > self.most


class Encoded(NamedTuple):
    """The ids of a text, its number of tokens before it is cut, and whether some of them are unknown."""

    ids: np.ndarray
    tokens: int
    unknown: bool


@dataclass(frozen=True)
class Tokenizer:
    """A pure function from text to ids, with the pieces that it learnt; made by `train` or `load`."""

    config: TokenizerConfig
    model: str = ""  # the pieces, as JSON of the `tokenizers` library; empty for bytes

    @property
    def vocab_size(self) -> int:
        """Number of ids, which count from 0."""
        return self._pieces.get_vocab_size() if self.config.kind == "words" else len(_SPECIAL) + 256

    def encode(self, text: str) -> np.ndarray:
        """Return ids (m,) int32, 1 <= m <= max_tokens; a caption without content is the null caption, [1]."""
        return self.encode_all([text])[0].ids

    def read(self, text: str) -> Reading:
        """Find what is cut of a text, and its unknown words."""
        whole, most = _encodable(text), self.config.max_tokens
        broken = tuple(word for word in text.split() if _encodable(word) != word)
        if self.config.kind == "bytes":
            return Reading(text, len(whole.encode()), most, broken)
        found = self._pieces.encode(whole, add_special_tokens=False)
        unknown = broken or _unknown_words(text, found)
        known = [text[slice(*at)] for i, at in zip(found.ids[:most], found.offsets) if i != UNKNOWN]
        spelt = any(unicodedata.category(letter)[0] not in "PZC" for piece in known for letter in piece)
        return Reading(text, len(found.ids), most, unknown, spelt or not unknown)

    def encode_all(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode captions, and count what is cut; equal captions are encoded once and share an array."""
        distinct = sorted(set(texts))
        if self.config.kind == "words":  # a batch is encoded by all cores
            batch = self._pieces.encode_batch([_encodable(t) for t in distinct], add_special_tokens=False)
            whole = [(found.ids, len(found.ids)) for found in batch]
        else:
            whole = [(self._byte_ids(text), len(_encodable(text).encode())) for text in distinct]
        made = [
            Encoded(np.array(ids[: self.config.max_tokens] or [NULL], np.int32), tokens, UNKNOWN in ids)
            for ids, tokens in whole
        ]
        once = dict(zip(distinct, made, strict=True))
        return [once[text] for text in texts]

    def embed(self, text: str) -> None:
        """Return None: the model learns its own embedding from the ids. (A pretrained encoder returns one.)"""

    @property
    def max_tokens(self) -> int:
        """Largest number of ids of a caption."""
        return self.config.max_tokens

    def save(self, path: str | Path) -> None:
        """Write one JSON file, whole or not at all."""
        content = {"config": asdict(self.config), "model": json.loads(self.model) if self.model else None}
        write_json(path, content)

    @cached_property
    def _pieces(self) -> Any:
        from tokenizers import Tokenizer as Pieces

        return Pieces.from_str(self.model)

    def _byte_ids(self, text: str) -> list[int]:
        data = _encodable(text).encode()[: self.config.max_tokens]
        whole = data.decode("utf-8", "ignore").encode()  # a cut must not leave half a character
        return [byte + len(_SPECIAL) for byte in whole]


class NoText:
    """The text of a model that reads none: every caption is the null caption."""

    max_tokens = 1

    def encode(self, text: str) -> np.ndarray:
        """Return the null caption, [1]."""
        return np.array([NULL], np.int32)

    def embed(self, text: str) -> None:
        """Return None: there is no embedding."""

    def read(self, text: str) -> Reading:
        """Report no token and no loss."""
        return Reading(text, 0, 1)


def _unknown_words(text: str, found: Any) -> tuple[str, ...]:
    """Return the words with an unknown piece; adjacent ones, as in scripts without blanks, are one."""
    ends: dict[int, list[int]] = {}
    for word, (start, end) in zip(found.word_ids, found.offsets, strict=True):
        ends.setdefault(word, [start, end])[1] = end
    spans: list[list[int]] = []
    for word in dict.fromkeys(word for word, i in zip(found.word_ids, found.ids, strict=True) if i == UNKNOWN):
        start, end = ends[word]
        if spans and spans[-1][1] == start:
            spans[-1][1] = end
        else:
            spans.append([start, end])
    return tuple(dict.fromkeys(text[start:end] for start, end in spans))


def _encodable(text: str) -> str:
    """Replace lone surrogates, which come from file names and broken sidecars, by question marks."""
    return text.encode("utf-8", "replace").decode()


def train(captions: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Learn word pieces (byte pair encoding, Sennrich et al. 2016, after NFKC and lower case) from captions.

    Equal captions in equal order give an equal tokenizer. UserError if there is no caption to learn from.
    """
    if config.kind == "bytes":
        return Tokenizer(config)
    captions = [_encodable(caption) for caption in captions if caption.strip()]
    check(captions, "tokenizer.kind is 'words'; it must be 'bytes' where the data has no caption")
    from tokenizers import Tokenizer as Pieces
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    pieces = Pieces(models.BPE(unk_token=_SPECIAL[UNKNOWN]))
    pieces.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.BertNormalizer(strip_accents=False, lowercase=True)]
    )
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # Byte pairs: the library's WordPiece trainer numbers its pieces differently in each process.
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab,
        limit_alphabet=config.vocab // 2,
        special_tokens=_SPECIAL,
        show_progress=False,
    )
    pieces.train_from_iterator(captions, trainer)
    model = json.loads(pieces.to_str())
    model["added_tokens"] = []  # else a caption that spells "<pad>" would become padding
    return Tokenizer(config, json.dumps(model, ensure_ascii=False))


def load(path: str | Path) -> Tokenizer:
    """Read what `Tokenizer.save` wrote; UserError if the file is missing or is something else."""
    try:
        content = json.loads(read_text(as_path(path)))
        model = content["model"]
        config = TokenizerConfig(**content["config"])
    except FileNotFoundError:
        raise UserError(f"tokenizer file {path} does not exist") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a tokenizer file of this program") from None
    return Tokenizer(config, json.dumps(model, ensure_ascii=False) if model else "")
