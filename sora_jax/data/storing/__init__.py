"""Keep what lies on the disk: record files, manifests, the parts that they are written in."""
