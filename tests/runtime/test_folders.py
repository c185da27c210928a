"""Folders that a command fills: nobody's files are spoilt, and one command writes at a time."""

import errno

import pytest

from bar_edge.runtime import folders
from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.folders import check_folder, locked
from bar_edge.runtime.manifest import MANIFEST


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_empty_or_not_there_may_be_filled(tmp_path, force):
    check_folder(tmp_path, force=force)
    check_folder(tmp_path / "absent" / "folder", force=force)


@pytest.mark.parametrize("kind", ["a file", "a folder", "a hidden file"])
def test_a_folder_that_holds_anything_may_be_filled_only_with_force(tmp_path, kind):
    if kind == "a folder":
        (tmp_path / "photographs").mkdir()
    else:
        (tmp_path / ("mine.png" if kind == "a file" else ".mine")).touch()
    with pytest.raises(RequestError, match="has files already; choose an empty folder, or pass --force"):
        check_folder(tmp_path, force=False)
    check_folder(tmp_path, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_bundle_or_a_file_is_never_filled(tmp_path, force):
    (tmp_path / MANIFEST).touch()
    with pytest.raises(RequestError, match="is a bundle, which other files would spoil"):
        check_folder(tmp_path, force=force)
    with pytest.raises(RequestError, match="is a file; choose a folder"):
        check_folder(tmp_path / MANIFEST, force=force)


def test_a_folder_is_held_by_one_until_it_lets_go_even_in_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        with pytest.raises(RequestError, match="another command is writing into it; let it finish"), locked(tmp_path):
            pass
        raise ZeroDivisionError
    with locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folders.fcntl, "flock", no_locks)
    with locked(tmp_path):
        pass
