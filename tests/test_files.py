"""Files and folders appear whole or not at all, whatever happens while they are written."""

import errno
import json

import pytest

from sora_jax.errors import UserError
from sora_jax.files import replacing, write_json, write_text


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "record.json"
    write_json(path, {"a": "é"})
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), OSError(errno.ENOSPC, "disk full")])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "notes.txt"
    write_text(path, "old")
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="notes.txt cannot be written: disk full" if expected is UserError else None):
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
