"""`canopy models`: what is there, whether it is sound, and weights that come in from outside."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from canopy.cli import app
from canopy.model.package import WEIGHTS, read_contract
from tests.model.test_foreign import chmv1_state, save_chmv1


def run(*words, code=0):
    done = CliRunner().invoke(app, ["models", *map(str, words)])
    assert done.exit_code == code, done.output
    if code:
        assert isinstance(done.exception, SystemExit), done.exception
        assert not done.stdout
    return done


def refused(*words):
    """The one line that says why."""
    lines = run(*words, code=1).stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("canopy: ")
    assert ";" in lines[0], "no remedy"
    return lines[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_chmv1(tmp_path_factory.mktemp("v1") / "downloads", chmv1_state())


def test_import_then_verify_then_show(checkpoint, tmp_path):
    out = tmp_path / "v1"
    done = run("import", "chmv1", checkpoint, "--out", out, "--name", "Tolan", "--json")
    assert json.loads(done.stdout) == {"model": str(out)}
    assert "tensors taken from 'state_dict'" in done.stderr
    report = json.loads(run("verify", out, "--json").stdout)
    contract = read_contract(out)
    assert report["weights_sha256"] == contract.weights_sha256
    assert report["deviation_m"].keys() == {"mean_m", "spread_m"}
    assert max(report["deviation_m"].values()) <= report["tolerance_m"] == 0.01
    text = run("verify", out).stdout
    assert "Tolan" in text
    assert contract.weights_sha256 in text
    assert "largest deviation mean" in text
    assert run("show", out).stdout.startswith("# Tolan")
    assert "canopy models verify" in run("import", "chmv1", checkpoint, "--out", out, "--overwrite").stdout


def test_verify_refuses_what_was_altered(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "m")
    tensors = load_file(model / WEIGHTS)
    save_file({key: value + 0.01 for key, value in tensors.items()}, model / WEIGHTS)
    assert "altered or cut short" in refused("verify", model)
    (model / WEIGHTS).unlink()
    assert "is missing" in refused("verify", model)
    assert "no model 'nowhere'" in refused("verify", "nowhere")


def test_import_says_what_is_wrong_in_a_line(checkpoint, tmp_path):
    out = tmp_path / "m"
    assert "choose from chmv2, chmv1" in refused("import", "chmv3", checkpoint, "--out", out)
    assert "nothing to import" in refused("import", "chmv2", "--out", out)
    assert "give one or the other" in refused("import", "chmv2", checkpoint, "--head", "a.pth", "--out", out)
    assert "--head is given alone" in refused("import", "chmv2", "--head", "a.pth", "--out", out)
    assert "b.pth does not exist" in refused("import", "chmv2", "--head", "a.pth", "--backbone", "b.pth", "--out", out)
    assert "import it as chmv1" in refused("import", "chmv2", checkpoint, "--out", out)
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "x.pth")
    assert "no chmv1 checkpoint" in refused("import", "chmv1", tmp_path / "x.pth", "--out", out)
    assert not out.exists()


def test_list_names_models_and_published_weights(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "models" / "mine")
    table = json.loads(run("list", "--json").stdout)
    assert {"mine", "canopy-sample"} <= {model["folder"].rsplit("/", 1)[-1] for model in table["models"]}
    published = {each["name"]: each["open"] for each in table["published"]}
    assert published["chmv1-huge"]
    assert not published["chmv2"]
    text = run("list").stdout
    assert "chmv2  DINOv3 License  (on request)" in text
    assert "models/mine" in text


def test_pull_of_weights_on_request_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused("pull", "chmv2")
    assert "dinov3_vitl16_chmv2_dpt_head-3703d643.pth" in line
    assert "canopy models import chmv2 FOLDER" in line
    assert "did you mean 'chmv1-huge'" in refused("pull", "chmv1-hug")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["list", "show", "verify", "import", "pull"])
def test_help_has_an_example(command):
    assert f"Example: canopy models {command}" in " ".join(run(command, "--help").stdout.split())
