"""`dreamreader.doctor`: which kernels run, and why."""

import json

import torch

from dreamreader import _register, doctor


def test_report_is_json_and_names_the_backend_of_every_operator():
    found = json.loads(json.dumps(doctor.report()))
    assert set(found["operators"]) == set(_register.active) >= {"intervene", "intervene_"}
    for owners in found["operators"].values():
        assert set(owners) == {"CPU", "CUDA", "other"}
        assert all(
            each["backend"] in _register.BACKENDS and each["reason"] for each in owners.values()
        )


def test_text_says_what_runs_where():
    found = doctor.report()
    text = doctor.render(found)
    backend = found["operators"]["intervene_"]["CPU"]["backend"]
    assert f"  intervene_   CPU    {backend}" in text
    assert f"dreamreader {found['dreamreader']}" in text


def test_every_device_has_its_own_line_with_what_runs_there(monkeypatch):
    """Two GPUs, of which the build has code for one."""
    names = {0: ("H200", (9, 0), ""), 1: ("T4", (7, 5), "the build is for sm_80: no kernel image")}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda n: names[n][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda n: names[n][1])
    monkeypatch.setattr(_register, "why_not_on", lambda n: names[n][2])
    text = doctor.render(doctor.report() | {"cuda": doctor._cuda()})
    assert "cuda       H200 (9.0): native kernels run\n" in text
    reason = "Triton or the references run: the build is for sm_80: no kernel image"
    assert f"           T4 (7.5): {reason}\n" in text


def test_text_without_the_native_module_says_what_to_do():
    found = doctor.report() | {"native": {"state": "missing", "reason": "not installed"}}
    assert "every operator runs on its reference in plain torch" in doctor.render(found)
    assert "install a C++ compiler and reinstall" in doctor.render(found)


def test_text_of_a_broken_module_says_so():
    found = doctor.report() | {"native": {"state": "broken", "error": "no symbol"}, "operators": {}}
    assert "native     BROKEN: no symbol" in doctor.render(found)
