"""The GPU benchmarks check their results, and their tables can be made, without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE))

import report  # noqa: E402


@pytest.mark.parametrize(
    "script",
    [["gpu.py", "--rows", "64", "--width", "96"], ["gpu_edits.py"], ["gpu_sae.py"]],
)
def test_the_results_are_right_before_they_are_timed(script):
    subprocess.run([sys.executable, HERE / script[0], *script[1:], "--check"], check=True)


def test_the_tables_name_the_gpu_and_its_ceilings(tmp_path, monkeypatch):
    where = {
        "device": "CPU", "threads": 1, "versions": {"torch": "2"}, "commit": "abc",
        "gpu": "NVIDIA H200", "copy_gigabytes_per_second": 4300, "gemm_teraflops": 790,
    }  # fmt: skip
    ratio = {"median": 1.1, "q20": 1.0, "q80": 1.2}
    ops = {
        "kind": "masked_steer", "dtype": "float32", "shape": [1, 8, 4], "goal": 1.15,
        "microseconds": {"fused": 11.0}, "fused_to_copy": ratio,
    }  # fmt: skip
    edits = {
        "case": "8x4-2", "dtype": "torch.float32", "to_copy": {"guide": ratio},
        "microseconds": {"guide": 2.0, "autograd": 8.0},
    }  # fmt: skip
    sae = {
        "case": "sparse 9x8", "dtype": "torch.float32", "base": "decode by bags",
        "to_base": {"decode": ratio, "decode by bags": ratio}, "peak_megabytes": 30,
        "microseconds": {"decode": 3.0, "decode by bags": 6.0},
    }  # fmt: skip
    for name, row in (("ops", ops), ("edits", edits), ("sae", sae)):
        result = {"environment": where, "backend": "native", "rows": [row]}
        result["goals"] = {"decode": 1.7}
        (tmp_path / f"gpu-{name}.json").write_text(json.dumps(result))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    table = report.table()
    assert "NVIDIA H200: copies 4300 GB/s, bfloat16 products 790 TFLOP/s" in table
    assert (
        "| steer every second token, float32 | 11.0 µs | 1.10× [1.00, 1.20] (goal 1.15×) |" in table
    )
    assert "| 8x4-2, float32: guide | 2.0 µs | 1.10× [1.00, 1.20] | 4.00× |" in table
    assert "| sparse 9x8, float32: decode | 3.0 µs | 2.00× as fast as bags (goal 1.7×) |" in table
    assert "| sparse 9x8, float32: peak | 30 MB |" in table
