"""`dreamreader.doctor`: which kernels run, and why."""

import json

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


def test_text_without_the_native_module_says_what_to_do():
    found = doctor.report() | {"native": {"state": "missing", "reason": "not installed"}}
    assert "every operator runs on its reference in plain torch" in doctor.render(found)
    assert "install a C++ compiler and reinstall" in doctor.render(found)


def test_text_of_a_broken_module_says_so():
    found = doctor.report() | {"native": {"state": "broken", "error": "no symbol"}, "operators": {}}
    assert "native     BROKEN: no symbol" in doctor.render(found)
