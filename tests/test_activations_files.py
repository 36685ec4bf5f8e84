"""Files appear whole or not at all, readable by others, and manifests say what is finished."""

import os
import sys
from pathlib import Path

import pytest

from activations.errors import InputError
from activations.files import is_finished, new_folder, read_manifest, write_bytes, write_manifest


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX permissions")
def test_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write_bytes(tmp_path / "file", b"")
        with new_folder(tmp_path / "folder") as folder:
            write_bytes(folder / "inside", b"")
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "folder" / "inside").stat().st_mode & 0o777 == 0o644


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with new_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(KeyboardInterrupt), new_folder(target) as folder:
        (folder / "b").write_text("2")
        raise KeyboardInterrupt
    assert [path.name for path in target.iterdir()] == ["a"]
    (tmp_path / ".target.killed").mkdir()
    with new_folder(target) as folder:
        (folder / "c").write_text("3")
    assert [path.name for path in target.iterdir()] == ["c"]
    assert list(tmp_path.iterdir()) == [target]


def test_manifests(tmp_path: Path) -> None:
    assert not is_finished(tmp_path, "thing", {"a": (1, 2)})
    write_manifest(tmp_path, "thing", {"a": (1, 2)}, fact=3)
    assert is_finished(tmp_path, "thing", {"a": (1, 2)})
    assert not is_finished(tmp_path, "thing", {"a": (1, 3)})
    assert not is_finished(tmp_path, "other", {"a": (1, 2)})
    assert read_manifest(tmp_path, "thing")["fact"] == 3
    with pytest.raises(InputError) as error:
        read_manifest(tmp_path, "list")
    assert str(error.value) == f"{tmp_path} holds thing, not a list."
    (tmp_path / "manifest.json").write_text('{"kind": "thing", "format_version": 2}')
    with pytest.raises(InputError) as error:
        read_manifest(tmp_path, "thing")
    assert str(error.value) == (
        f"{tmp_path} was written in format 2, and this saescope reads up to format 1: install a newer saescope."
    )
