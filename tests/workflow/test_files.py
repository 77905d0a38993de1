"""Files are written whole or not at all."""

import errno
import os
import re

import pytest

from kddp_ext.files import atomic_write, write_json, write_text


def test_content_and_permissions(tmp_path):
    write_text(tmp_path / "a.txt", "grün")
    assert (tmp_path / "a.txt").read_bytes() == "grün".encode()
    write_json(tmp_path / "a.json", {"a": [1, 2]})
    assert (tmp_path / "a.json").read_text().startswith('{\n  "a"')
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("no"), KeyboardInterrupt()]
)
def test_a_failure_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(file):
        file.write(b"new, but")
        raise error

    with pytest.raises(type(error)) as caught:
        atomic_write(path, write)
    if isinstance(error, OSError):
        assert caught.value.errno == errno.ENOSPC
        assert f"cannot write {path}: No space left on device" in str(caught.value)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match=re.escape(f"cannot write {tmp_path}/none/a.txt: No such file")):
        write_text(tmp_path / "none" / "a.txt", "x")


def test_a_disk_that_turns_out_full_when_the_file_is_synced(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=r"cannot write .*No space left"):
        write_text(tmp_path / "a.txt", "x")
    assert not os.listdir(tmp_path)
