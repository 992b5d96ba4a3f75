"""A build by Apache Beam is the build of one process, to the byte."""

import pytest
from fixtures_datasets import same_folder
from fixtures_runs import write_clips

from sora_jax.data.building.build import build
from sora_jax.data.building.prepare import BuildConfig
from sora_jax.data.sources import SourceConfig
from sora_jax.errors import UserError


def config(tmp_path, name, **changes) -> BuildConfig:
    source = SourceConfig(path=str(tmp_path / "clips"))
    options = dict(max_frames=9, multiple=8, max_pixels=384, clips_per_shard=2, workers=0) | changes
    return BuildConfig(out=str(tmp_path / name), sources=(source,), **options)


@pytest.fixture
def clips(tmp_path):
    write_clips(tmp_path / "clips")
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"not a video")
    (tmp_path / "clips" / "broken.txt").write_text("a caption of nothing")


def test_the_same_folder(tmp_path, clips):
    pytest.importorskip("apache_beam", reason="needs sora_jax[beam]")
    from sora_jax.data.building.beam import build_with_beam

    alone = build(config(tmp_path, "alone"), progress=False)
    by_beam = build_with_beam(config(tmp_path, "beam"), "--runner=DirectRunner --direct_num_workers=2")
    assert len(alone) == len(by_beam) == 6 and len(by_beam.refused) == 1
    same_folder(alone.path, by_beam.path)
    assert build_with_beam(config(tmp_path, "beam")).digest == alone.digest  # built before: kept


def test_without_beam_the_way_to_it_is_told(tmp_path, clips, monkeypatch):
    from sora_jax.data.building.beam import build_with_beam

    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install -e '.*\[beam\]'"):
        build_with_beam(config(tmp_path, "beam"))
