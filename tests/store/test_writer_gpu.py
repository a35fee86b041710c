"""Rows that come from a GPU: their order on a twin, and on a GPU where there is one."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dreamreader._register import native
from dreamreader.store.layout import SiteLayout
from dreamreader.store.reference import ReferenceWriter
from dreamreader.store.writer import open_writer
from tests.store.writing import MOMENTS, RUN, SAMPLES, rows_of, same_files

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
pytestmark = pytest.mark.skipif(native()[0] is None, reason="the native module is not built")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_rows_of_a_gpu_arrive_in_order(tmp_path: Path):
    """The CUDA code itself, with streams that are threads and take their time."""
    source = Path(__file__).parents[1] / "twin" / "capture.cpp"
    csrc = source.parents[2] / "csrc"
    folders = [source.parent / "streams", csrc, csrc / "capture"]
    flags = "-std=c++20 -O1 -DDREAMREADER_CUDA=1 -Wall -Wextra -Werror -pthread".split()
    program = tmp_path / "capture"
    command = ["g++", *flags, *(f"-I{each}" for each in folders), str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([program, tmp_path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stderr == ""


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8], ids=str)
def test_rows_of_a_gpu_are_those_of_the_reference(tmp_path: Path, stored: torch.dtype):
    layout = SiteLayout("wide", 1024, stored, torch.bfloat16)
    names = {"gpu": open_writer(tmp_path / "gpu", RUN, device="cuda"), "cpu": None}
    names["cpu"] = ReferenceWriter(tmp_path / "cpu", RUN)
    for name, writer in names.items():
        site = writer.site(layout)
        for number in range(2):
            writer.begin(number)
            for n in range(40):
                x, places, keys = rows_of(layout, 400, 100 * number + n, n % 3)
                writer.put(site, x.cuda() if name == "gpu" else x, places, keys)
            writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
        writer.close()
    assert len(same_files(tmp_path / "gpu", tmp_path / "cpu")) == 6


@needs_gpu
@pytest.mark.gpu
def test_a_put_from_a_gpu_neither_waits_nor_allocates_after_the_first_unit(tmp_path: Path):
    writer = open_writer(tmp_path, RUN, device="cuda")
    layout = SiteLayout("wide", 1024, torch.bfloat16, torch.bfloat16)
    site, puts = writer.site(layout), [rows_of(layout, 400, n, n % 3) for n in range(40)]
    puts = [(x.cuda(), places, keys) for x, places, keys in puts]
    for number in range(2):
        writer.begin(number)
        free = torch.cuda.mem_get_info()[0]
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            for each in puts:
                writer.put(site, *each)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert number == 0 or torch.cuda.mem_get_info()[0] == free
        writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
    writer.close()
