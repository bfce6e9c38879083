import json
import os
import subprocess
import sys

import pytest

from canopy import doctor
from canopy.doctor import Finding, _catalogues, examine, summary
from canopy.model.package import find_model

CANOPY = [sys.executable, "-m", "canopy.cli", "doctor", "--json"]


def states(findings):
    return {finding["part"]: finding["state"] for finding in findings}


def test_tries_every_part_of_a_machine_that_works(monkeypatch):
    monkeypatch.setattr(doctor, "_window_s", lambda model: 0.5)  # loading proves it works; how fast it is, is no test
    found = list(examine())
    assert not [each for each in found if each.state == "broken"]
    by_part = {each.part: each for each in found}
    assert {"coordinates (PROJ)", "rasters (GDAL)", "LiDAR (LAZ)", "model", "sealed benchmark"} <= set(by_part)
    contract_stride_px = 192
    assert f"about {(contract_stride_px * 0.6) ** 2 / 1e6 * 7200:,.3g} km² an hour" in by_part["model"].found
    assert summary(found).startswith("everything needed works")


@pytest.mark.slow
def test_tables_of_another_program_are_named_with_the_remedy(tmp_path):
    environment = {**os.environ, "PROJ_DATA": str(tmp_path), "PROJ_LIB": str(tmp_path)}
    done = subprocess.run(CANOPY, env=environment, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout)
    assert done.returncode == 1
    assert states(told["findings"])["coordinates (PROJ)"] == "broken"
    assert f"unset PROJ_DATA={tmp_path}" in next(f["remedy"] for f in told["findings"] if f["state"] == "broken")
    assert told["summary"].startswith("1 broken: coordinates")


def test_an_altered_model_is_broken_and_a_missing_one_is_not(tmp_path):
    sample = find_model("canopy-sample").resolve()
    (altered := tmp_path / "altered").mkdir()
    for file in sample.iterdir():
        (altered / file.name).symlink_to(file)
    weights = (altered / "weights.safetensors").read_bytes()
    (altered / "weights.safetensors").unlink()
    (altered / "weights.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    (broken,) = doctor._models(str(altered))
    assert broken.state == "broken"
    assert "weights.safetensors" in broken.found
    (absent,) = doctor._models("no-such-model")
    assert absent.state == "limited"
    assert "no-such-model" in absent.found


def test_a_full_or_closed_disk_is_said(monkeypatch):
    def closed(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", closed)
    here, temporary = doctor._disks()
    assert (here.state, temporary.state) == ("limited", "limited")
    assert "Read-only file system" in here.found
    assert "--out" in here.remedy
    assert "TMPDIR" in temporary.remedy


def test_catalogues_are_asked(tmp_path, monkeypatch, serve_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "catalog.json").write_text("{}")
    site = serve_folder(tmp_path / "site")
    (tmp_path / "data" / "there.toml").write_text(f'endpoint = "{site.url}/catalog.json"\n')
    (tmp_path / "data" / "gone.toml").write_text(f'[[catalogue]]\nhref = "{site.url}/none.json"\n')
    (tmp_path / "data" / "again.toml").write_text(f'endpoint = "{site.url}/catalog.json"\n')
    found = list(_catalogues(["there", "gone", "again"]))
    assert [(each.part, each.state) for each in found] == [
        ("catalogue of there, again", "ok"), ("catalogue of gone", "limited"),
    ]  # fmt: skip
    assert "HTTPError" in found[1].found


def test_a_line_says_state_part_and_remedy():
    assert Finding(part="a", state="ok", found="b").line() == "ok       a: b"
    assert Finding(part="a", state="broken", found="b", remedy="c").line() == "broken   a: b; c"
