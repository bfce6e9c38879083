"""The shape of the package: imports go one way, torch and `rasterio.open` stay where they belong, and the start is quick.

Imports inside functions count as much as those at the top of a file: the direction is about what a part knows, not when.
"""

import ast
import graphlib
import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = (
    {"errors", "settings", "grid", "heap", "textfile", "raster", "metrics", "page", "symbology"},
    {"tiler", "simulate"},
    {"model"},
    {"mosaicker"},
    {"region"},
    {"score", "analyse", "view", "demo", "doctor"},
    {"cli", "__main__"},
)
"""Parts of the package from the foundation up; a part imports from its own layer and from those before it."""

LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

TORCH_FREE = (
    "errors", "settings", "grid", "heap", "textfile", "raster", "metrics", "page", "symbology", "tiler",
    "model.squares", "model.shift", "view",
    "mosaicker.blend", "mosaicker.dates", "mosaicker.publish", "mosaicker.sheets", "mosaicker.quantum", "mosaicker.vrt",
    "mosaicker.gti",
)  # fmt: skip
TORCH_FAMILY = {
    "torch",
    "torchvision",
    "torchmetrics",
    "lightning",
    "pytorch_lightning",
    "timm",
    "segmentation_models_pytorch",
}
"""torch itself and the libraries that import it."""

FORBIDDEN_NAMES = {"util", "utils", "common", "core", "helper", "helpers", "misc"}

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "canopy").rglob("*.py"))
}
"""Source of every module by its name, `canopy.tiler.lidar` or, for a package's `__init__`, `canopy.tiler`."""

PACKAGES = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "canopy").rglob("__init__.py")}


# --- reading the source


def imports(module: str, source: str) -> dict[str, int]:
    """Everything that a module imports, as dotted names down to the imported object, with the line."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name: node.lineno for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - (module in PACKAGES)
                stem = module.rsplit(".", up)[0] if up else module
                base = f"{stem}.{base}".rstrip(".")
            found |= {f"{base}.{alias.name}": node.lineno for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                found[node.args[0].value] = node.lineno
    return found


def part(name: str) -> str:
    """The part of the package a module or an imported object is in: `tiler` for `canopy.tiler.lidar.lidar_to_chm`."""
    return name.split(".")[1] if name.startswith("canopy.") else ""


def in_part(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == f"canopy.{p}" or name.startswith(f"canopy.{p}.") for p in parts)


def upward_imports(module: str, source: str) -> list[str]:
    """Imports of a later layer. What the root package itself defines (`canopy.__version__`) has no layer."""
    if module == "canopy":
        return [f"{module}:{line}: {name}" for name, line in imports(module, source).items() if part(name) in LEVEL]
    own = LEVEL[part(module)]
    return [
        f"{module}:{line}: {name}"
        for name, line in imports(module, source).items()
        if part(name) in LEVEL and LEVEL[part(name)] > own
    ]


def torch_imports(module: str, source: str) -> list[str]:
    """Imports that need torch in a module that must do without: torch's family, or a part of canopy not free of it."""
    if not in_part(module, TORCH_FREE):
        return []
    return [
        f"{module}:{line}: {name}"
        for name, line in imports(module, source).items()
        if name.split(".")[0] in TORCH_FAMILY
        or name.startswith("safetensors.torch")
        or (part(name) in {"model", "mosaicker"} and not in_part(name, TORCH_FREE))
    ]


def raster_opens(module: str, source: str) -> list[str]:
    """Uses of `rasterio.open`, under whatever name, outside `canopy.raster`."""
    if module == "canopy.raster":
        return []
    tree = ast.parse(source)
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "rasterio"
    }
    uses = [
        f"{module}:{node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "open" and getattr(node.value, "id", None) in names
    ]
    return uses + [f"{module}:{line}" for name, line in imports(module, source).items() if name == "rasterio.open"]


def bad_names(module: str) -> list[str]:
    return [f"{module}: {word}" for word in module.split(".") if word.strip("_") in FORBIDDEN_NAMES]


def module_of(name: str) -> str | None:
    """The module that an imported name is or lives in; None outside the package."""
    while name not in SOURCES and "." in name:
        name = name.rsplit(".", 1)[0]
    return name if name in SOURCES else None


# --- the package


def test_every_module_has_a_layer():
    unknown = {part(module) for module in SOURCES} - set(LEVEL) - {""}
    assert not unknown, f"give {unknown} a place in LAYERS"


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_one_way(module):
    assert not upward_imports(module, SOURCES[module])


@pytest.mark.parametrize("module", SOURCES)
def test_no_torch_where_it_must_not_be(module):
    assert not torch_imports(module, SOURCES[module])


@pytest.mark.parametrize("module", SOURCES)
def test_rasters_are_opened_in_one_module(module):
    assert not raster_opens(module, SOURCES[module])


@pytest.mark.parametrize("module", SOURCES)
def test_modules_are_named_for_what_they_hold(module):
    assert not bad_names(module)


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    edges = {m: {module_of(name) for name in imports(m, s)} for m, s in sources.items()}
    return {m: {to for to in targets if to and to not in {m, "canopy"}} for m, targets in edges.items()}


def test_no_import_cycles():
    tuple(graphlib.TopologicalSorter(import_graph(SOURCES)).static_order())


def test_the_checks_see_the_whole_package():
    """Guards against a check that passes because it looks at nothing."""
    assert {"canopy", "canopy.grid", "canopy.tiler", "canopy.mosaicker.blend"} <= set(SOURCES)
    assert any(name.startswith("canopy.errors.") for name in imports("canopy.grid", SOURCES["canopy.grid"]))
    assert any(name == "torch" for name in imports("canopy.model.network", SOURCES["canopy.model.network"]))


# --- negative controls: what each check exists to find


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("canopy.grid", "from canopy.tiler.lidar import lidar_to_chm"),
        ("canopy.grid", "import canopy.region"),
        ("canopy.grid", "from canopy import region"),
        ("canopy.tiler.chips", "def late():\n    from canopy.model.network import HeightNetwork"),
        ("canopy.tiler.chips", "from ..model import network"),
        ("canopy.tiler", "from ..model import network"),
        ("canopy.model.train", "from canopy.mosaicker import predict"),
        ("canopy.region", "import importlib\nimportlib.import_module('canopy.cli')"),
        ("canopy.simulate", "if TYPE_CHECKING:\n    from canopy.model.package import HeightModel"),
        ("canopy", "from canopy.grid import Grid"),
    ],
)
def test_upward_imports_are_found(module, source):
    assert upward_imports(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("canopy.region", "from canopy import __version__"),
        ("canopy.tiler.chips", "from . import lidar\nfrom ..grid import Box\nfrom canopy.simulate import reimage"),
        ("canopy.cli", "import canopy.region, numpy"),
        ("canopy.grid", "'from canopy.cli import main'  # text, not an import"),
    ],
)
def test_downward_imports_are_allowed(module, source):
    assert not upward_imports(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("canopy.grid", "import torch"),
        ("canopy.metrics", "def late():\n    from torch.nn import functional"),
        ("canopy.tiler.lidar", "import timm.models as zoo"),
        ("canopy.mosaicker.blend", "from lightning import Trainer"),
        ("canopy.mosaicker.publish", "import segmentation_models_pytorch"),
        ("canopy.mosaicker.blend", "from canopy.model.package import HeightModel"),
        ("canopy.mosaicker.publish", "from .predict import predict_sheet"),
        ("canopy.raster", "from safetensors.torch import load_file"),
    ],
)
def test_torch_is_found(module, source):
    assert torch_imports(module, source)


def test_torch_is_allowed_in_the_model():
    assert not torch_imports("canopy.model.network", "import torch")
    assert not torch_imports("canopy.mosaicker.predict", "import torch")
    assert not torch_imports("canopy.mosaicker.blend", "import torchlight")


@pytest.mark.parametrize(
    "source",
    [
        "import rasterio\nwith rasterio.open('a.tif') as f: pass",
        "def late():\n    import rasterio as rio\n    return rio.open('a.tif')",
        "from rasterio import open as read",
        "import rasterio\nopener = rasterio.open",
    ],
)
def test_rasterio_open_is_found(source):
    assert raster_opens("canopy.tiler.imagery", source)
    assert not raster_opens("canopy.raster", source)


def test_other_opens_are_allowed():
    assert not raster_opens("canopy.tiler.imagery", "import rasterio\nopen('a')\npath.open()\nrasterio.warp.reproject(a, b)")


def test_vague_names_are_found():
    assert bad_names("canopy.utils")
    assert bad_names("canopy.tiler._helpers")
    assert bad_names("canopy.core.grid")
    assert not bad_names("canopy.tiler.score_common_sense")


def test_cycles_are_found():
    cycle = {"canopy.grid": "def f():\n    import canopy.raster", "canopy.raster": "from canopy.grid import Grid"}
    with pytest.raises(graphlib.CycleError):
        tuple(graphlib.TopologicalSorter(import_graph(cycle)).static_order())


# --- without torch


WITHOUT_TORCH = """
import importlib.abc, sys

class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is not installed (blocked by the test)")

sys.meta_path.insert(0, NoTorch())
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    plain = {"COLUMNS": "200", "NO_COLOR": "1", "_TYPER_FORCE_DISABLE_TERMINAL": "1"}  # help as text, its lines not broken
    command, environment = [sys.executable, "-c", code], {**os.environ, **plain}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_torch_free_parts_import_without_torch():
    modules = [module for module in SOURCES if in_part(module, TORCH_FREE)]
    done = python(WITHOUT_TORCH + "".join(f"import {module}\n" for module in modules))
    assert done.returncode == 0, done.stderr


def test_the_model_does_not_import_without_torch():
    """Negative control: the block works."""
    done = python(WITHOUT_TORCH + "import canopy.model.network\n")
    assert done.returncode != 0
    assert "blocked by the test" in done.stderr


# --- the start of the program


HEAVY = sorted(
    TORCH_FAMILY | {"geopandas", "pandas", "pyarrow", "h5py", "laspy", "sklearn", "scipy", "skimage", "matplotlib", "numba"}
)

HELP = """
import json, sys
import canopy.cli
sys.argv = ["canopy", *{words!r}, "--help"]
try:
    canopy.cli.main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("\\n" + json.dumps([name for name in {heavy!r} if name in sys.modules]))
"""


def test_help_loads_nothing_heavy():
    for words in ([], ["map"]):
        done = python(HELP.format(words=words, heavy=HEAVY))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == []


def cpu_seconds(command: list[str]) -> float:
    """Processor time of one run; unlike time on the wall it does not count waiting for other programs."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{command} exits with {process.returncode}"
    return usage.ru_utime + usage.ru_stime


def test_help_answers_within_half_a_second():
    canopy = Path(sys.executable).parent / "canopy"
    best = min(cpu_seconds([str(canopy), "--help"]) for _ in range(5))
    assert best < 0.5, f"canopy --help takes {best:.2f} s"


# --- what is promised


def test_public_names_are_defined_where_they_are_said_to_be():
    tree = ast.parse(SOURCES["canopy"])
    public = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_PUBLIC"
    )
    assert public
    for name, module in public.items():
        defined = {getattr(node, "name", None) for node in ast.parse(SOURCES[module]).body}
        assert name in defined, f"canopy.{name} is not defined in {module}"


def readme_commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = (line.split("#")[0].split() for block in blocks for line in textwrap.dedent(block).splitlines())
    return [words for words in lines if words]


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {words[1] for words in readme_commands() if words[0] == "make"}
    assert {"demo", "test"} <= named <= targets


def test_canopy_commands_of_the_readme_exist():
    """Each with every option the README gives it, and with every file of the repository it names."""
    commands = [words[1:] for words in readme_commands() if words[0] == "canopy"]
    assert commands
    for command, *words in commands:
        group = [command]
        if command in {"tile", "models", "bench"}:
            group.append("build" if command == "tile" and words[0] != "inspect" else words[0])
        done = python(HELP.format(words=group, heavy=[]))
        assert done.returncode == 0, f"canopy {command}: {done.stderr}"
        missing = [word for word in words if word.startswith("--") and word not in done.stdout]
        assert not missing, f"canopy {command} has no {missing}"
        given = [word for before, word in pairwise(["", *words]) if before != "--out"]
        files = [ROOT / word for word in given if word.startswith(("tiles/", "models/"))]
        assert all(file.exists() for file in files), f"canopy {command} names a missing file of {files}"


def test_the_lock_is_names_and_versions_of_what_is_declared():
    lines = [line for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]*==[0-9][0-9a-z.]*", line) for line in lines), "name==version only"
    locked = {line.split("==")[0] for line in lines}
    assert len(locked) == len(lines)
    assert lines == sorted(lines, key=lambda line: line.split("==")[0])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", line)[0].lower()) for line in declared}
    assert names <= locked, f"not locked: {names - locked}"
