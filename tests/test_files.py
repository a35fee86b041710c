import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dreamreader._files import lock_folder, lock_for_reading, replacing, write_atomic
from dreamreader.errors import InvalidInput


def test_writes_text_and_bytes_and_makes_folders(tmp_path):
    path = write_atomic(tmp_path / "a" / "b.txt", "grün")
    assert path.read_text(encoding="utf-8") == "grün"
    assert write_atomic(path, b"\x00").read_bytes() == b"\x00"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_the_old_file_and_no_rest(tmp_path, error):
    path = write_atomic(tmp_path / "report.html", "old")
    with pytest.raises(error), replacing(path) as part:
        part.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_file_mode_follows_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        path = write_atomic(tmp_path / "x", "x")
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o640


def test_ctrl_c_in_another_process_leaves_nothing(tmp_path):
    code = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # our parent may ignore it
        "from dreamreader._files import replacing\n"
        f"with replacing({str(tmp_path / 'out.bin')!r}) as part:\n"
        "    part.write_bytes(b'half')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(30)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    assert len(os.listdir(tmp_path)) == 1
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode != 0 and os.listdir(tmp_path) == []


def test_names_are_on_the_disk_before_anything_goes_on(tmp_path, monkeypatch):
    """After a crash a folder has the names that it had when it was last synchronised."""
    done = []
    fsync, rename = os.fsync, Path.replace

    def synced(handle):
        done.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renamed(part, target):
        done.append(("rename", str(target)))
        return rename(part, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    write_atomic(tmp_path / "x", "x")
    assert [kind for kind, _ in done] == ["fsync", "rename", "fsync"]
    assert done[1:] == [("rename", str(tmp_path / "x")), ("fsync", str(tmp_path))]
    done.clear()
    with lock_folder(tmp_path / "new"):
        assert done == [("fsync", str(tmp_path))]


def test_a_lock_that_is_a_link_is_refused_and_what_it_points_to_stays(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("thesis")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(precious)
    with (
        pytest.raises(InvalidInput, match=r"run/\.lock is a link; delete it"),
        lock_folder(tmp_path / "run"),
    ):
        pass
    assert precious.read_text() == "thesis"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, code):
    def fails(handle, kind):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", fails)
    for lock in (lock_folder, lock_for_reading):
        with pytest.raises(InvalidInput, match=f"cannot be locked \\({os.strerror(code)}\\)"):
            with lock(tmp_path):
                pass


def test_readers_share_a_folder_that_no_writer_has(tmp_path):
    with lock_for_reading(tmp_path), lock_for_reading(tmp_path):
        with pytest.raises(InvalidInput, match="another process runs here"), lock_folder(tmp_path):
            pass
    with lock_folder(tmp_path):
        with pytest.raises(InvalidInput, match="another process"), lock_for_reading(tmp_path):
            pass
