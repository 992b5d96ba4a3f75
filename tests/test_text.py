"""The text encoder: captions packed together are read as if alone, and a dropped one as the empty one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.data.feeding.tokenizer import NULL, TokenizerConfig, train
from sora_jax.errors import UserError
from sora_jax.models.text import TextConfig, encode_text, text_specs
from sora_jax.nn.pack import drop_captions
from sora_jax.nn.params import count

CONFIG = TextConfig(vocabulary=16, width=16, depth=2, head_width=8)
encode = jax.jit(functools.partial(encode_text, config=CONFIG))


@pytest.fixture(scope="module")
def params(randomised):
    return randomised(text_specs(CONFIG))


def with_caption(clip, *ids):
    return dataclasses.replace(clip, text=np.array(ids))


def test_packed_captions_equal_captions_alone(params, clips, packed, alone):
    context = encode(params, pack=packed([clips[:3], clips[3:]]))
    for row, slot, clip in [(0, 0, clips[0]), (0, 1, clips[1]), (0, 2, clips[2]), (1, 0, clips[3])]:
        single = encode(params, pack=alone(clip))
        mine = np.flatnonzero(np.asarray(context.segments_BM[row]) == slot + 1)
        np.testing.assert_allclose(context.tokens_BME[row, mine], single.tokens_BME[0], atol=2e-5)
        np.testing.assert_allclose(context.pooled_BSE[row, slot], single.pooled_BSE[0, 0], atol=2e-5)


def test_the_pooled_caption_is_the_mean_of_its_tokens(params, clips, packed):
    context = encode(params, pack=packed([clips]))
    start = 0
    for slot, clip in enumerate(clips):
        tokens = context.tokens_BME[0, start : start + len(clip.text)]
        np.testing.assert_allclose(context.pooled_BSE[0, slot], tokens.mean(0), atol=1e-6)
        start += len(clip.text)


def test_an_empty_slot_has_a_finite_pooled_caption(params, clips, packed):
    assert not encode(params, pack=packed([clips[:2]])).pooled_BSE[0, 2:].any()


def test_other_captions_have_exactly_no_gradient(params, clips, packed):
    """The captions share no token, so the rows of the table tell whose caption was read."""
    pack = packed([clips])

    def loss(table, slot):
        context = encode_text(params | {"table": table}, CONFIG, pack)
        own = (pack.text_segments_BM == slot + 1)[..., None]
        return jnp.square(context.pooled_BSE[:, slot]).sum() + jnp.where(own, context.tokens_BME**3, 0).sum()

    gradient = jax.jit(jax.grad(loss))
    for slot, clip in enumerate(clips):
        read = np.asarray(gradient(params["table"], slot)).any(-1)
        assert set(np.flatnonzero(read)) == set(clip.text.tolist())


def test_the_order_of_words_matters(params, clips, alone):
    one, other = (encode(params, pack=alone(with_caption(clips[0], *ids))) for ids in ((3, 4, 5), (5, 4, 3)))
    assert np.abs(one.pooled_BSE - other.pooled_BSE).max() > 0.01


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_dropped_caption_is_the_empty_caption(params, clips, packed, alone, length):
    long = with_caption(clips[0], *range(3, 3 + length))
    pack = packed([[clips[1], long, clips[2]]])
    dropped = encode(params, pack=drop_captions(pack, jnp.asarray([[False, True, False, False]])))
    empty = train(["a clip"], TokenizerConfig(kind="bytes")).encode("")
    assert empty.tolist() == [NULL]
    expected = encode(params, pack=alone(with_caption(clips[0], *empty)))
    mine = dropped.tokens_BME[0, np.asarray(pack.text_segments_BM[0]) == 2]
    np.testing.assert_allclose(mine, jnp.broadcast_to(expected.tokens_BME[0], mine.shape), atol=2e-5)
    np.testing.assert_allclose(dropped.pooled_BSE[0, 1], expected.pooled_BSE[0, 0], atol=2e-5)
    kept = encode(params, pack=pack)
    for slot in (0, 2):
        np.testing.assert_array_equal(dropped.pooled_BSE[0, slot], kept.pooled_BSE[0, slot])


def test_parameter_count_in_closed_form():
    V, E, depth = 16, 16, 2
    attention, mlp = 4 * (E * E + E), (E * 4 * E + 4 * E) + (4 * E * E + E)
    assert count(text_specs(CONFIG)) == V * E + depth * (attention + mlp)


@pytest.mark.parametrize("change, message", [({"vocabulary": 2}, "vocabulary is 2"), ({"width": 20}, "width is 20")])
def test_wrong_options_are_named(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **change)
