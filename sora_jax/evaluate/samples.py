"""Keep the generated clips of an evaluation in a folder, without loss, so that none is sampled twice.

    KEY/samples.json     what the clips are samples of; KEY is a digest of it
    KEY/00000.npz ...    a clip each, uint8 (T, H, W, 3) under the name "clip"

The key covers all that a clip depends on: the weights of denoiser and autoencoder, prompts, sizes, sampling, seed. So
clips of other weights or settings lie in other folders and are never taken for these. Sampling that was interrupted
goes on with the batch that was at hand; batches are what they would have been, so the clips are, too.
"""

import dataclasses
import hashlib
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.config import to_dict
from sora_jax.console import note
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.errors import UserError
from sora_jax.files import as_path, local_copy, make_folder, replacing, write_json
from sora_jax.generate.requests import Request
from sora_jax.generate.run import Run
from sora_jax.train.checkpoint import digest_of

RECORD = "samples.json"
NETWORK = ("model", "diffusion", "packing", "tokenizer")  # fields of a run's config that samples depend on


@dataclasses.dataclass(frozen=True)
class KeptClips(Sequence):
    """Read clips, uint8 (T, H, W, 3), that a folder keeps, by their number."""

    folder: Path
    total: int

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self.total:
            raise IndexError(number)
        path = self._path(number)
        try:
            with np.load(local_copy(path)) as file:
                return file["clip"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{str(path)!r} is damaged: {error}; remove it, and it is sampled again") from error

    def keep(self, number: int, clip: np.ndarray) -> None:
        """Write a clip; it appears when it is whole."""
        with replacing(self._path(number)) as temporary:
            np.savez_compressed(temporary, clip=clip)

    @property
    def kept(self) -> set[int]:
        """Return the numbers of the clips that are there."""
        there = {path.name for path in self.folder.iterdir()}
        return {number for number in range(self.total) if self._path(number).name in there}

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05}.npz"


def sample_kept(
    model: Run, requests: Sequence[Request], sampling: SamplingConfig, seed: int, folder: Path
) -> KeptClips:
    """Sample the clips of requests that `folder` does not keep from an earlier call, and return all."""
    identity = identify(model, requests, sampling, seed)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    clips = KeptClips(as_path(folder) / digest, len(requests))
    make_folder(clips.folder)
    write_json(clips.folder / RECORD, identity)
    done = clips.kept
    if done:
        note(f"{len(done)} of {len(requests)} clips are kept in {clips.folder}")
    if len(done) == len(requests):
        return clips
    for number, clip in model.stream(requests, sampling, seed, bar=True, done=done):
        clips.keep(number, clip)
    return clips


def identify(model: Run, requests: Sequence[Request], sampling: SamplingConfig, seed: int) -> dict:
    """Return all that samples depend on, as JSON values."""
    config = to_dict(model.config)
    return {
        "step": model.step,
        "weights": digest_of(model.params),
        "autoencoder": model.autoencoder.weights_digest,
        "network": {name: config[name] for name in NETWORK},
        "sampling": to_dict(sampling),
        "seed": seed,
        "requests": [[r.prompt, *r.size, r.clip_id, r.label, r.guidance, r.negative] for r in requests],
    }
