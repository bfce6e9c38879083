"""`canopy score` as people call it: its table, its JSON, its one-line errors, and what it leaves in the folder."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from canopy.cli import app
from canopy.score import ScoreResult, read_result
from tests.score.rasters import model, write, write_map

TRUE_M = np.arange(16.0).reshape(4, 4)


@pytest.fixture
def canopy(monkeypatch):
    """Runs `canopy score WORDS` without drawing the page."""

    def page(result, folder, pictures):
        (folder / "report.html").write_text("page")

    monkeypatch.setattr("canopy.score.report.write_report", page)
    return lambda *words: CliRunner().invoke(app, ["score", *map(str, words)])


@pytest.fixture
def pair(tmp_path):
    return write_map(tmp_path / "map", TRUE_M + 1, models=[model(footprints=())]), write(tmp_path / "chm.tif", TRUE_M)


def test_a_table_and_two_files(canopy, pair, tmp_path):
    done = canopy(pair[0], "--reference", pair[1], "--out", tmp_path / "score")
    assert done.exit_code == 0, done.output
    assert "MAE m" in done.output
    assert "+1.00" in done.output
    assert "report.html" in done.output.splitlines()[-1]
    result = read_result(tmp_path / "score" / "score.json")
    assert result.comparisons[0].maps[0].measures.bias_m.value == 1
    assert result.command.startswith("canopy")


def test_json_is_the_result(canopy, pair, tmp_path):
    other = write(tmp_path / "other.tif", (10 * TRUE_M).astype(np.uint16), unit=None, nodata=None)
    done = canopy(
        pair[0], "--reference", pair[1], "--against", f"{other},name=dm,unit=0.1", "--reference-date", "2020",
        "--out", tmp_path / "score", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = ScoreResult.model_validate(json.loads(done.stdout))
    assert result == read_result(tmp_path / "score" / "score.json")
    assert [m.name for m in result.comparisons[0].maps] == ["map", "dm"]
    assert result.comparisons[0].reference.dates == ("2020",)
    assert result.comparisons[0].maps[1].measures.mae_m.value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no reference is given"),
        (("--reference", "CHM", "--gsd", "0.2"), "finer than the 1 m"),
        (("--reference", "CHM", "--statistic", "mode"), "is not known"),
        (("--reference", "CHM", "--settings", "none.toml"), "does not exist"),
        (("--reference", "CHM", "--reference-date", "spring"), "neither a day nor a year"),
        (("--reference", "CHM", "--against", "CHM,unit=ten"), "band and unit are numbers"),
    ],
)
def test_errors_are_one_line(canopy, pair, tmp_path, words, message):
    done = canopy(pair[0], *(word.replace("CHM", str(pair[1])) for word in words), "--out", tmp_path / "score")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert message in line
    assert not (tmp_path / "score").exists()


def test_a_leak_is_refused_and_marked(canopy, pair, tmp_path):
    leaky = write_map(tmp_path / "leaky", TRUE_M, models=[model()])
    done = canopy(leaky, "--reference", pair[1], "--out", tmp_path / "score")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert "site here" in line
    assert "--allow-leak" in line
    assert not (tmp_path / "score").exists()
    done = canopy(leaky, "--reference", pair[1], "--out", tmp_path / "score", "--allow-leak")
    assert done.exit_code == 0
    assert done.stdout.startswith("LEAK: ")
    assert "LEAK - airborne lidar" in done.stdout
    assert read_result(tmp_path / "score" / "score.json").leaked
