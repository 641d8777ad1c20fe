"""Files written whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from dtrain.tracking.whole_file import fsync, read_json, whole_file, write_bytes, write_json, write_text


def test_a_file_appears_with_all_of_its_content(tmp_path: Path) -> None:
    file = tmp_path / "volume.nii.gz"
    with whole_file(file) as temporary:
        temporary.write_bytes(b"first half")
        assert not file.exists()
        assert temporary.parent == tmp_path and temporary.name.startswith(".")
        assert temporary.name.endswith(file.name), "some libraries choose the format by the name's ending"
        with temporary.open("ab") as rest:
            rest.write(b", second half")
    assert file.read_bytes() == b"first half, second half"
    assert list(tmp_path.iterdir()) == [file]


def test_a_new_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "whole", "text")
        (tmp_path / "plain").write_text("text")
    finally:
        os.umask(before)
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    file = tmp_path / "run.json"
    file.write_text("old")
    with pytest.raises(type(error)), whole_file(file) as temporary:
        temporary.write_text("new")
        raise error
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_before_anything_was_written_is_the_one_that_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no format"), whole_file(tmp_path / "file"):
        raise ValueError("no format")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("durable", [False, True])
def test_a_durable_file_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, durable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, synced = tmp_path / "file", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((os.fstat(descriptor).st_size, file.exists())))
    write_bytes(file, b"content", durable=durable)
    assert synced == ([(7, False)] if durable else [])
    assert file.read_bytes() == b"content"


def test_a_failed_fsync_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = tmp_path / "file"
    file.write_text("old")
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output"):
        write_text(file, "new", durable=True)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_sync_folders_is_no_error(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    fsync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=os.strerror(number)):
        fsync(tmp_path / "file")


def test_json_is_read_as_it_was_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "run.json"
    assert read_json(file) == {}
    write_json(file, {"path": tmp_path, "step": 3})
    assert file.read_text() == f'{{\n "path": "{tmp_path}",\n "step": 3\n}}\n'
    assert read_json(file) == {"path": str(tmp_path), "step": 3}
    file.write_text("[1, 2]")
    assert read_json(file) == {} and caplog.text == ""
    file.write_text('{"path": ')
    assert read_json(file) == read_json(file) == {}
    assert caplog.text.count(f"{file} is damaged") == 1, "a command reads it many times"
