import os
import signal
import subprocess
import sys
import time

import pytest

from dreamreader._files import replacing, write_atomic


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
        "import sys, time\n"
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
    process.communicate(timeout=20)
    time.sleep(0.05)
    assert process.returncode != 0 and os.listdir(tmp_path) == []
