"""Files appear whole or not at all, readable by others, and manifests say what is finished."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from activations.errors import InputError
from activations.files import is_finished, new_folder, read_manifest, write_bytes, write_manifest

ROOT = Path(__file__).parents[1]


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
    code = """
import os, sys
from pathlib import Path
os.umask(0o027)
from activations.files import new_folder, write_bytes
write_bytes(Path("file"), b"")
with new_folder(Path("folder")) as folder:
    write_bytes(folder / "inside", b"")
"""
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "folder" / "inside").stat().st_mode & 0o777 == 0o640


def test_writing_leaves_the_umask_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting it, as reading it does, lets threads that write at the same time set each other's for good."""
    asked: list[int] = []
    monkeypatch.setattr(os, "umask", lambda mask: asked.append(mask) or 0o022)
    write_bytes(tmp_path / "file", b"")
    with new_folder(tmp_path / "folder"):
        pass
    assert asked == []


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


def test_a_folder_that_was_put_aside_when_the_process_was_killed_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, replace = tmp_path / "target", os.replace
    with new_folder(target) as folder:
        (folder / "a").write_text("1")

    def killed(source: Path, destination: Path) -> None:
        if destination == target:
            raise SystemExit
        replace(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr("activations.files.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(SystemExit), new_folder(target) as folder:
            (folder / "b").write_text("2")
    assert not target.exists()
    assert len(list(tmp_path.iterdir())) == 2  # the old one and the new one, neither in its place
    with new_folder(tmp_path / "tar"), new_folder(tmp_path / "target.2"):
        pass  # folders that are named alike touch neither
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(KeyboardInterrupt), new_folder(target):
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "1"
    assert {path.name for path in tmp_path.iterdir()} == {"target", "tar", "target.2"}


def test_what_was_left_of_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".run.v2.x1y2z3.old").mkdir()  # of run.v2
    with new_folder(tmp_path / "run") as folder:
        (folder / "a").write_text("1")
    assert {path.name for path in tmp_path.iterdir()} == {"run", ".run.v2.x1y2z3.old"}
    with new_folder(tmp_path / "run.v2"):
        assert (tmp_path / "run.v2").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.v2"}


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
