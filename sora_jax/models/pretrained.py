"""Embed captions by a pretrained text encoder (T5, UMT5, CLIP) of `transformers`, once, for the latent cache."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from sora_jax.config import check
from sora_jax.data.feeding.tokenizer import NULL, UNKNOWN, Reading
from sora_jax.data.storing.latents import TextInfo
from sora_jax.errors import UserError, install_command

CLASSES = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
BATCH = 16  # captions embedded at once


@dataclass(frozen=True)
class PretrainedText:
    """Embed captions by a pretrained encoder: text to (m, E) with m <= max_tokens.

    It takes the place of a tokenizer. Its token ids only tell null captions, which have no content, from others.

    Raises:
        UserError: on first use, if the library or the model is missing, or the weights are not the expected ones.
    """

    name: str  # on the Hugging Face hub, or a local folder
    max_tokens: int  # a longer caption is truncated
    fingerprint: str | None = None  # of the expected weights; None: any

    def encode(self, text: str) -> np.ndarray:
        """Return token ids (m,) int32: NULL for a caption without content, else UNKNOWN."""
        return np.full(len(self.embed(text)), UNKNOWN if text.strip() else NULL, np.int32)

    def embed(self, text: str) -> np.ndarray:
        """Return the embedding (m, E) of one caption in float16."""
        return self.embed_all([text])[0]

    def read(self, text: str) -> Reading:
        """Say how a text is read: its tokens before truncation to max_tokens, and its words of unknown tokens."""
        words = list(dict.fromkeys(text.split())) if self._is_unknown(text) else []
        unknown = tuple(word for word in words if self._is_unknown(word))
        pieces = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        spelt = not unknown or any(piece != self._tokenizer.unk_token_id for piece in pieces)
        return Reading(text, len(self._tokenizer(text)["input_ids"]), self.max_tokens, unknown, spelt)

    def _is_unknown(self, text: str) -> bool:
        """Return True if a piece of a text is not known."""
        return self._tokenizer.unk_token_id in self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def embed_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the embeddings of several captions; equal captions are computed once."""
        distinct = sorted(set(texts), key=lambda text: (len(text), text))  # similar lengths in a batch: little padding
        found: dict[str, np.ndarray] = {}
        for start in range(0, len(distinct), BATCH):
            batch = distinct[start : start + BATCH]
            found |= zip(batch, self._run(batch), strict=True)
        return [found[text] for text in texts]

    @property
    def info(self) -> TextInfo:
        """Return the description that a latent cache stores."""
        return TextInfo(self.name, _fingerprint(self._model), self.width, self.max_tokens)

    @property
    def width(self) -> int:
        """Return E, the width of an embedding."""
        config = self._model.config
        return getattr(config, "d_model", None) or config.hidden_size

    def _run(self, texts: Sequence[str]) -> list[np.ndarray]:
        import torch

        inputs = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = self._model(**inputs.to(self._model.device)).last_hidden_state.float().cpu().numpy()
        values = [row[mask > 0] for row, mask in zip(hidden, inputs["attention_mask"].cpu().numpy(), strict=True)]
        check(
            all(np.isfinite(v).all() for v in values),
            f"--text-encoder is {self.name!r}; its embeddings must be finite, and some are not",
        )
        return [value.astype(np.float16) for value in values]

    @cached_property
    def _model(self) -> Any:
        transformers = _library()
        config = self._load(transformers.AutoConfig)
        model = self._load(getattr(transformers, CLASSES.get(config.model_type, "AutoModel"))).eval()
        check(
            self.fingerprint in (None, _fingerprint(model)),
            f"--text-encoder is {self.name!r}; it must have the weights that this run was trained with, and has others",
        )
        import torch

        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def _tokenizer(self) -> Any:
        return self._load(_library().AutoTokenizer)

    def _load(self, kind: Any) -> Any:
        """Load a model, config or tokenizer by the class `kind` of transformers."""
        try:
            return kind.from_pretrained(self.name)
        except (OSError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"--text-encoder is {self.name!r}; it cannot be loaded: {first}") from error


def _fingerprint(model: Any) -> str:
    """Return a hash of the weights of a PyTorch model."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _library() -> ModuleType:
    """Import transformers; UserError if it or torch is missing."""
    try:
        import torch  # noqa: F401 - without it, transformers can be imported but fails later
        import transformers
    except ImportError as error:
        raise UserError(f"a pretrained text encoder needs {error.name}: {install_command('text')}") from error
    return transformers
