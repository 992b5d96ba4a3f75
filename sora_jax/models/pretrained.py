"""Text embeddings of a pretrained encoder (T5, UMT5, CLIP), by `transformers`; computed once, beside the latents."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sora_jax.config import check
from sora_jax.data.latents import TextInfo
from sora_jax.data.tokenizer import NULL, UNKNOWN
from sora_jax.errors import UserError

CLASSES = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
BATCH = 16
INSTALL = "pip install 'sora_jax[text]'"


@dataclass(frozen=True)
class PretrainedText:
    """A text encoder by its name on a hub, or its folder: captions to embeddings (m, E), m <= max_tokens.

    It stands where a tokenizer stands; its ids only tell the null caption (of a caption without content) from others.
    fingerprint: of the weights that are expected. UserError where the library or the model is not there, or is another.
    """

    name: str
    max_tokens: int
    fingerprint: str | None = None

    def encode(self, text: str) -> np.ndarray:
        """Ids (m,) int32: NULL for a caption without content, else UNKNOWN."""
        return np.full(len(self.embed(text)), UNKNOWN if text.strip() else NULL, np.int32)

    def embed(self, text: str) -> np.ndarray:
        """The embedding (m, E) float16 of one caption."""
        return self.embed_all([text])[0]

    def length(self, text: str) -> int:
        """Tokens of a text before it is cut to max_tokens."""
        return len(self._tokenizer(text)["input_ids"])

    def embed_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The embeddings of many captions; equal ones are computed once, those of like length together."""
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        found = {}
        for start in range(0, len(distinct), BATCH):
            batch = distinct[start : start + BATCH]
            found |= zip(batch, self._run(batch), strict=True)
        return [found[text] for text in texts]

    @property
    def info(self) -> TextInfo:
        """What a cache keeps of it; the fingerprint is of the weights."""
        return TextInfo(self.name, _fingerprint(self._model), self.width, self.max_tokens)

    @property
    def width(self) -> int:
        """E."""
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
            f"--text-encoder is {self.name!r}; it gave values that are not finite",
        )
        return [value.astype(np.float16) for value in values]

    @cached_property
    def _model(self):
        transformers = _library()
        config = self._load(transformers.AutoConfig)
        model = self._load(getattr(transformers, CLASSES.get(config.model_type, "AutoModel"))).eval()
        check(
            self.fingerprint in (None, _fingerprint(model)),
            f"the text encoder {self.name!r} has other weights than those that this run has learnt from",
        )
        import torch

        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def _tokenizer(self):
        return self._load(_library().AutoTokenizer)

    def _load(self, kind):
        try:
            return kind.from_pretrained(self.name)
        except (OSError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"--text-encoder is {self.name!r}; it cannot be loaded: {first}") from error


def _fingerprint(model) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _library():
    try:
        import torch  # noqa: F401 - transformers imports without it, and fails later
        import transformers
    except ImportError as error:
        raise UserError(f"a pretrained text encoder needs {error.name}: {INSTALL}") from error
    return transformers
