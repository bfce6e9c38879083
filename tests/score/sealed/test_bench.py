"""The whole of it from the command line, with models in processes of their own."""

import json
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from canopy.cli import app
from canopy.errors import ContractError
from canopy.model.package import load_model
from canopy.raster import read_raster
from canopy.score.sealed import predict, runner
from canopy.score.sealed.confine import run
from canopy.score.sealed.judge import judge
from canopy.score.sealed.key import open_key
from tests.score.sealed.conftest import retrained

pytestmark = pytest.mark.slow


def call(*words):
    done = CliRunner().invoke(app, ["bench", *map(str, words)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


@pytest.fixture(scope="module")
def sealed(world, tmp_path_factory):
    """A task sealed from the command line, its base model run as submissions are."""
    room = tmp_path_factory.mktemp("bench")
    done = call(
        "seal", world.tiles, "--out", room / "task", "--key", room / "task.key", "--base", world.base, "--split", "all",
        "--least-px", 200, "--by-site", "--threads", 1, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return room, json.loads(done.stdout)


def test_seal_template_score(sealed, world, tmp_path):
    room, made = sealed
    assert made["base"]["seconds"] > 1, "a process was started for the base model"
    assert made["base"]["memory_mib"] > 100
    same = retrained(world.base, tmp_path / "same", noise=0.0, sites=("ELSEWHERE",))
    trained = call("template", room / "task", tmp_path / "sub", "--model", same, "--tile-set", world.elsewhere)
    assert trained.exit_code == 0, trained.output
    done = call("score", room / "task", room / "task.key", tmp_path / "sub", "--out", tmp_path / "result.json")
    assert done.exit_code == 0, done.output
    assert "Landlock" in done.output or sys.platform != "linux"
    told = json.loads((tmp_path / "result.json").read_text())
    assert told["status"] == "scored"
    assert told["score"] == 0, "weights that were not moved predict to the last bit what the base model does"
    assert told["budget"]["measured"]["ended"] == "itself"
    (tmp_path / "sub" / "model" / "run.py").write_text("print(1)")
    done = call("score", room / "task", room / "task.key", tmp_path / "sub")
    assert done.exit_code == 3
    assert "model/run.py may hold a program" in done.output


def test_the_base_model_says_in_its_process_what_it_says_here(sealed, world, tmp_path):
    room, _ = sealed
    (tmp_path / "out").mkdir()
    runner.predict_folder(world.base, room / "task" / "image", tmp_path / "out")
    with open_key(room / "task.key") as key:
        for chip in key.record.chips:
            there = key.array(f"base/{chip.name}")
            np.testing.assert_allclose(np.load(tmp_path / "out" / f"{chip.name}.npy"), there, atol=1e-4)


def test_a_model_process_that_reads_the_labels(sealed, world, tmp_path, monkeypatch):
    """The runner with an attack built in: with the labels in reach it would score 1, confined it ends with an error."""
    room, _ = sealed
    attack = tmp_path / "attack.py"
    attack.write_text(ATTACK.format(key=room / "task.key", tiles=world.tiles))
    folder = tmp_path / "sub"
    call("template", room / "task", folder, "--model", world.model, "--tile-set", world.elsewhere)

    def command(images, out):
        return [sys.executable, "-I", str(attack), str(images), str(out)]

    def confined(model, images, out, budget):
        return run(command(images, out), read=[model, images, attack], write=out, budget=budget)

    def free(model, images, out, budget):
        return run(command(images, out), read=[model, images, attack, room, world.tiles], write=out, budget=budget)

    verdict = judge(room / "task", room / "task.key", folder, predict=confined)
    assert verdict.status == "fallback"
    assert "Permission denied" in verdict.reasons[0].said
    assert verdict.score.value == 0
    verdict = judge(room / "task", room / "task.key", folder, predict=free)
    assert verdict.score.value == 1, "what the confinement is for"


ATTACK = """
import io, json, pathlib, sys, zipfile
import numpy as np
images, out = map(pathlib.Path, sys.argv[1:])
with zipfile.ZipFile("{key}") as key:
    for path in images.glob("*.tif"):
        label = np.load(io.BytesIO(key.read("height/" + path.stem + ".npy")))
        np.save(out / (path.stem + ".npy"), label)
"""


def test_a_model_that_takes_too_long_is_ended(sealed, world, tmp_path):
    room, _ = sealed
    call("template", room / "task", tmp_path / "sub", "--model", world.model, "--tile-set", world.elsewhere)

    def slow(model, images, out, budget):
        tight = budget.model_copy(update={"seconds": 0.3})
        return predict.run_model(model, images, out, tight)

    verdict = judge(room / "task", room / "task.key", tmp_path / "sub", predict=slow)
    assert verdict.status == "fallback"
    assert [reason.check for reason in verdict.reasons] == ["budget"]
    assert verdict.ran.ended == "out of time"


def test_a_model_folder_cannot_name_files_to_read(sealed, world, tmp_path):
    """A contract whose backbone is a path is refused by the strict loader that the confined process uses."""
    room, _ = sealed
    model = tmp_path / "model"
    shutil.copytree(world.model, model)
    text = (model / "model.toml").read_text()
    (model / "model.toml").write_text(text.replace("vit_tiny_patch16_224", f"local-dir:{room}"))
    with pytest.raises(ContractError, match="timm has no backbone"):
        load_model(model)
    load_model(world.base)


def test_what_the_command_line_refuses(sealed, world, tmp_path):
    room, _ = sealed
    seal = ["seal", world.tiles, "--out", tmp_path / "t", "--key", tmp_path / "k", "--base", world.base]
    for words, said in (
        (["--positions", "about"], "positions 'about' is unknown; choose coarse, exact"),
        (["--accept", "zip"], "accepts 'zip' is unknown"),
        (["--grid-km", "0"], "not a positive length"),
        (["--seconds", "-1"], "seconds = -1 is out of range"),
        (["--split", "none"], "no chip in split"),
    ):
        done = call(*seal, *words)
        assert done.exit_code == 1
        assert said in done.output
        assert done.output.count("\n") == 1
    assert call("score", room / "task", room / "none.key", tmp_path).exit_code == 1
    assert not [*tmp_path.iterdir()]


def test_images_of_a_task_hold_pixels_and_nothing_more(sealed, world):
    room, _ = sealed
    weights = load_file(world.base / "weights.safetensors")
    assert weights, "the base model stays where it is; the task names it"
    for path in (room / "task" / "image").iterdir():
        pixels, _ = read_raster(path)
        assert pixels.data.shape == (3, 128, 128)
