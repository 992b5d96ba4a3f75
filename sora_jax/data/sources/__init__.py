"""Sources of clips: a source lists its entries without reading media, and opens each on demand.

================  =========================================================================================
`folder`          videos and pictures in a folder, in zip and tar files too; captions beside them or in tables
`webdataset`      tar shards of samples: a media file with its texts
`array_record`    a dataset made by `sora-jax data build`
`tfds:NAME`       a dataset prepared by TensorFlow Datasets as ArrayRecord; TensorFlow is not needed
`world`           the embedded world
================  =========================================================================================
"""

from sora_jax.data.sources.config import SourceConfig
from sora_jax.data.sources.entries import Entry, Media, Source
from sora_jax.data.sources.selection import make_source

__all__ = ["Entry", "Media", "Source", "SourceConfig", "make_source"]
