"""Which caption a clip has in an epoch, and the tokens of all captions."""

import dataclasses

import numpy as np
import pytest
from fixtures_caches import INFO, TEXT, clip_row, embeddings_of, packs_of, write_cache

from sora_jax.data.feeding.pipeline import PackedBatches
from sora_jax.data.feeding.texts import CaptionChoice, EmbeddedCaptions, TokenizedCaptions, captions_in_order, parse_mix
from sora_jax.data.feeding.tokenizer import NULL, TokenizerConfig, train
from sora_jax.data.packing.packs import PackingConfig
from sora_jax.errors import UserError

BOTH = {"original": "a dog", "synthetic": "a brown dog runs over a field"}
BYTES = train([], TokenizerConfig(kind="bytes", max_tokens=40))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """1,000 clips with both kinds, in either order, and 60 with one kind, a third kind, or none."""
    rows = [clip_row(n, (1, 2, 2), BOTH if n % 2 else dict(reversed(BOTH.items()))) for n in range(1000)]
    few = [{"original": "only"}, {"label": "cat", "other": "x"}, {}]
    rows += [clip_row(1000 + n, (1, 2, 2), few[n % 3]) for n in range(60)]
    return write_cache(tmp_path_factory.mktemp("captions") / "cache", rows, each=500)


def chosen(cache, mix, epoch=0, seed=0):
    """The kind that each clip takes, None where it has no caption."""
    clips = np.arange(len(cache))
    numbers = CaptionChoice(cache, mix)(seed, epoch, clips)
    kinds = cache.column("kinds").to_pylist()
    return [kinds[clip][number] if kinds[clip] else None for clip, number in zip(clips, numbers, strict=True)]


@pytest.mark.parametrize("mix,share", [("dalle3", 0.95), ("sd3", 0.5), ("any", 0.5), ("original=3,synthetic=1", 0.25)])
def test_kinds_are_taken_in_their_shares(cache, mix, share):
    taken = chosen(cache, mix)[:1000]
    assert taken.count("synthetic") / 1000 == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / 1000))
    assert taken.count("synthetic") + taken.count("original") == 1000


def test_a_clip_without_the_kinds_of_the_mix_takes_its_first_caption(cache):
    for mix in ("dalle3", "synthetic=1", "first"):
        assert chosen(cache, mix)[1000:1006] == ["original", "label", None] * 2
    assert set(chosen(cache, "any")[1001::3]) == {"label", "other"}
    assert chosen(cache, "first")[:4] == ["synthetic", "original"] * 2
    assert set(chosen(cache, "synthetic=1")[:1000]) == {"synthetic"}


def test_the_choice_belongs_to_seed_epoch_and_clip(cache):
    choice = CaptionChoice(cache, "sd3")
    clips = np.arange(1000)
    numbers = choice(0, 2, clips)
    np.testing.assert_array_equal(choice(0, 2, clips[::-3]), numbers[::-3])
    for other in (choice(0, 3, clips), choice(1, 2, clips), choice(0, 2, clips, copies=1)):
        assert 0.4 < (other != numbers).mean() < 0.6


def test_a_kind_that_no_clip_has_is_told(cache):
    with pytest.raises(UserError, match="captions is 'synthetc=1'.*label, original, other, synthetic"):
        CaptionChoice(cache, "synthetc=1")


@pytest.mark.parametrize("mix", ["original", "a=b", "a=-1,b=2", "a=0", ""])
def test_a_mix_that_cannot_be_is_told(mix):
    with pytest.raises(UserError, match="captions is .*first, any, dalle3, sd3"):
        parse_mix(mix)


def test_tokens_are_those_of_each_caption(cache):
    texts, captions = TokenizedCaptions(cache, BYTES), cache.column("captions").to_pylist()
    clips, numbers = np.array([0, 1, 1, 1000, 1001, 1002]), np.array([1, 0, 1, 0, 1, 0])
    words = [(captions[clip] or [""])[number] for clip, number in zip(clips, numbers)]
    np.testing.assert_array_equal(texts.lengths(clips, numbers), [len(BYTES.encode(word)) for word in words])
    for clip, number, word in zip(clips, numbers, words):
        np.testing.assert_array_equal(texts.ids(clip, number), BYTES.encode(word))
    assert list(captions_in_order(cache)) == [caption for each in captions for caption in each or [""]]


def test_kept_tokens_are_read_and_not_made_again(cache, tmp_path, monkeypatch):
    first = TokenizedCaptions(cache, BYTES, tmp_path / "captions")
    assert not (tmp_path / "captions").exists()  # nothing is written before it is known that the run starts
    first.flush()
    monkeypatch.setattr("sora_jax.data.feeding.texts._tokenize", lambda *_: pytest.fail("made again"))
    second = TokenizedCaptions(cache, BYTES, tmp_path / "captions")
    np.testing.assert_array_equal(second.ids(17, 1), first.ids(17, 1))
    monkeypatch.undo()
    shorter = train([], TokenizerConfig(kind="bytes", max_tokens=4))
    assert len(TokenizedCaptions(cache, shorter, tmp_path / "captions").ids(17, 0)) == 4  # another tokenizer: not those


def test_embeddings_travel_to_the_pack_and_the_null_caption_is_marked(tmp_path):
    info = dataclasses.replace(INFO, text=TEXT)
    captions = [{"original": "a b c", "synthetic": "d e"}, {}, {"original": " "}, {"original": "f g h i"}]
    rows = [clip_row(n, (1, 2, 2), captions[n]) for n in range(4)]
    cache = write_cache(tmp_path / "cache", rows, info)
    texts = EmbeddedCaptions(cache)
    np.testing.assert_array_equal(texts.lengths(np.array([0, 0, 1, 2, 3]), np.array([0, 1, 0, 0, 0])), [3, 2, 1, 1, 4])
    config = PackingConfig(length=8, slots=4, text_length=16, patch=(1, 2, 2))
    stream = PackedBatches(cache, None, config, 1, 0, captions="synthetic=1")
    (row,) = packs_of(stream, 1)
    assert row["embeddings_ME"].shape == (16, 3)
    for slot, clip_id in enumerate(row["clip_ids_S"]):
        clip = int(np.flatnonzero(cache.clip_ids == clip_id)[0])
        inside = row["text_segments_M"] == slot + 1
        expected = embeddings_of(rows[clip])[1 if clip == 0 else 0]
        np.testing.assert_array_equal(row["embeddings_ME"][inside], expected)
        assert set(row["text_M"][inside] == NULL) == {clip in (1, 2)}
