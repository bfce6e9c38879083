"""The walk-throughs in notebooks/ run from the first cell to the last, as a reader would run them."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


def read(path):
    return nbformat.read(path, nbformat.NO_CONVERT)


def run(notebook, folder, monkeypatch):
    """Execute in `folder`; commands are those of the interpreter that runs the tests."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()
    return notebook


def figures(notebook):
    return [
        number
        for number, cell in enumerate(notebook.cells)
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


def test_there_are_four():
    assert NAMES == ["01-map-a-region", "02-train-on-your-lidar", "03-read-the-error-map", "04-change-and-zonal"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_is_kept_with_the_outputs_of_a_whole_run(path):
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert len(figures(notebook)) >= 2
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    said = "".join(cell.source + "".join(out.get("text", "") for out in cell.get("outputs", [])) for cell in notebook.cells)
    assert str(FOLDER.parent) not in said
    assert "/tmp/" not in said
    assert path.stat().st_size < 1_500_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_runs(path, tmp_path, monkeypatch):
    stored = read(path)
    ran = run(read(path), tmp_path, monkeypatch)
    assert figures(ran) == figures(stored)
    assert (tmp_path / "out" / path.stem[:2]).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("line", ["canopy map --imagery gone.tif --model canopy-sample --out out", "false"])
def test_a_command_that_fails_stops_it(line, tmp_path, monkeypatch):
    cell = nbformat.v4.new_code_cell(f"%%bash\nset -e\n{line}\ntrue")
    with pytest.raises(CellExecutionError):
        run(nbformat.v4.new_notebook(cells=[cell]), tmp_path, monkeypatch)
