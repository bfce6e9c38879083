"""What this machine can do with canopy, what it lacks, and how to get it: each part is tried, not only looked for."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import shutil
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from canopy import __version__
from canopy.errors import CanopyError

State = Literal["ok", "limited", "absent", "broken"]
"""Works; works with a limit that is told; an extra that is not there; needed, and does not work."""

SHOWN_GSD_M: Final = 0.6
"""The pixel size that speeds are told for, that of most aerial photographs."""

LEAST_MEMORY_GB: Final = 4.0
"""A map of any size takes 1 GB and the model; training takes more."""

LEAST_DISK_GB: Final = 5.0

_TIMED_WINDOWS = 3
_ANSWER_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One part of the machine or the installation."""

    part: str
    state: State
    found: str
    """What is there."""
    remedy: str | None = None
    """What to do about it, where something can be done."""

    def line(self) -> str:
        """As people read it."""
        return f"{self.state:<8} {self.part}: {self.found}{f'; {self.remedy}' if self.remedy else ''}"


def examine(*, model: str = "canopy-sample", online: bool = False) -> Iterator[Finding]:
    """Look at this machine, part by part; nothing is changed, and nothing asked of the network unless `online`.

    Args:
        model: Model folder or name, which is loaded, checked by its fixture, and timed.
        online: Also ask the catalogues of imagery and LiDAR whether they answer.
    """
    yield _python()
    yield _cores()
    yield _memory()
    yield from _disks()
    coordinates = _coordinates()
    yield coordinates
    if coordinates.state != "broken":  # without them no raster has a place
        yield _rasters()
    yield _lidar()
    yield from _gpus()
    yield from _models(model)
    yield _page()
    yield _qgis()
    yield from _clusters()
    yield _confinement()
    if online:
        from canopy.tiler.sources import known_sources

        yield from _catalogues(known_sources())


# --- the machine ---------------------------------------------------------------------------------------------------------


def _python() -> Finding:
    found = f"canopy {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return Finding(part="canopy", state="ok", found=found)


def _cores() -> Finding:
    import psutil
    import torch

    process = psutil.Process()
    # Where the system can bind a process to cores, the machine may have more than it may use.
    cores = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if threads < cores:
        return Finding(
            part="processor", state="limited", found=f"{cores} cores, of which torch uses {threads}",
            remedy="unset OMP_NUM_THREADS to use all",
        )  # fmt: skip
    return Finding(part="processor", state="ok", found=f"{cores} core{'s' * (cores > 1)}")


def _memory() -> Finding:
    from canopy.mosaicker.batch import free_bytes

    free_gb = free_bytes() / 1e9
    found = f"{free_gb:.1f} GB free"
    if free_gb < LEAST_MEMORY_GB:
        remedy = f"close programs or ask for more, a map takes 1 GB and the model, training {LEAST_MEMORY_GB:g} GB and more"
        return Finding(part="memory", state="limited", found=found, remedy=remedy)
    return Finding(part="memory", state="ok", found=found)


def _disks() -> Iterator[Finding]:
    for part, folder in (("disk of this folder", Path.cwd()), ("disk for temporary files", Path(tempfile.gettempdir()))):
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"canopy")
        except OSError as error:
            yield Finding(
                part=part, state="limited", found=f"{folder} cannot be written ({error.strerror})",
                remedy="give --out a folder elsewhere" if folder == Path.cwd() else "point TMPDIR to a folder elsewhere",
            )  # fmt: skip
            continue
        free_gb = shutil.disk_usage(folder).free / 1e9
        short = free_gb < LEAST_DISK_GB
        yield Finding(
            part=part, state="limited" if short else "ok", found=f"{free_gb:.0f} GB free in {folder}",
            remedy="free some: a map takes up to 44 bytes a pixel while it is made" if short else None,
        )  # fmt: skip


# --- libraries that bring data or programs of their own ------------------------------------------------------------------


def _coordinates() -> Finding:
    """PROJ finds its tables; those of another program, named by an environment variable, are the usual trouble."""
    from pyproj import Transformer
    from pyproj.exceptions import ProjError
    from rasterio.errors import CRSError
    from rasterio.warp import transform

    from canopy.raster import GDAL_ERRORS

    named = [f"{name}={os.environ[name]}" for name in ("PROJ_DATA", "PROJ_LIB", "GDAL_DATA") if name in os.environ]
    try:
        lon, lat = Transformer.from_crs(32610, 4326, always_xy=True).transform(500_000.0, 4_873_000.0)
        (other,), _ = transform("EPSG:32610", "EPSG:4326", [500_000.0], [4_873_000.0])
        right = math.isclose(lon, -123, abs_tol=1e-9) and math.isclose(other, -123, abs_tol=1e-9) and 43 < lat < 45
        wrong = None if right else f"the central meridian of UTM zone 10 comes out at {lon:.6f} and {other:.6f} degrees"
    except (ProjError, CRSError, *GDAL_ERRORS) as error:
        wrong = str(error).splitlines()[0].rstrip(".")
    if wrong is not None:
        remedy = f"unset {', '.join(named)}" if named else "install pyproj and rasterio anew"
        return Finding(part="coordinates (PROJ)", state="broken", found=wrong, remedy=remedy)
    if named:
        found = f"work, but {', '.join(named)} has them read tables of another program"
        return Finding(part="coordinates (PROJ)", state="limited", found=found, remedy="unset it if places come out wrong")
    return Finding(part="coordinates (PROJ)", state="ok", found="pyproj and GDAL agree")


def _rasters() -> Finding:
    """Writes a small COG and reads it back."""
    import numpy as np
    import rasterio
    from pyproj import CRS
    from rasterio.drivers import raster_driver_extensions

    from canopy.grid import Box, Lattice
    from canopy.mosaicker.publish import stage_sheet, write_pair

    part = "rasters (GDAL)"
    box = Box(64, 64, 80, 80)
    lattice = Lattice(crs=CRS.from_epsg(32610), gsd_m=1.0)
    heights = np.arange(256, dtype=np.float32).reshape(16, 16) / np.float32(32)
    try:
        with tempfile.TemporaryDirectory(prefix="canopy-doctor-") as folder:
            with stage_sheet(Path(folder), lattice, box) as (sheet, writer):
                writer.write(box, heights, np.repeat(heights[None], 3, axis=0))
            pair = Path(folder) / "height.tif", Path(folder) / "error.tif"
            write_pair(*pair, [sheet], lattice=lattice, box=box, tags={})
    except CanopyError as error:
        return Finding(part=part, state="broken", found=str(error))
    # The list holds drivers by the ending of their files; JPEG imagery is common, the rest is always there.
    drivers = set(raster_driver_extensions().values())
    lacking = sorted({"GTiff", "JPEG", "PNG", "VRT"} - drivers)
    found = f"GDAL {rasterio.__gdal_version__} writes and reads cloud-optimized GeoTIFFs"
    if lacking:
        return Finding(part=part, state="limited", found=f"{found}, but not {', '.join(lacking)}")
    return Finding(part=part, state="ok", found=found)


def _lidar() -> Finding:
    import laspy

    part = "LiDAR (LAZ)"
    backends = [backend.name for backend in laspy.LazBackend.detect_available()]
    if not backends:
        return Finding(part=part, state="broken", found="nothing that decompresses LAZ", remedy="pip install lazrs")
    return Finding(part=part, state="ok", found=f"laspy {laspy.__version__} with {', '.join(backends)}")


def _page() -> Finding:
    from canopy.view import maplibre

    part = "canopy view"
    if not maplibre.in_place():
        found = f"MapLibre GL {maplibre.VERSION}, which draws the map, is not there"
        return Finding(part=part, state="limited", found=found, remedy=f"with a network, once: {maplibre.COMMAND}")
    return Finding(part=part, state="ok", found=f"its page and MapLibre GL {maplibre.VERSION} are there and need no network")


def _qgis() -> Finding:
    part = "QGIS"
    program = shutil.which("qgis") or shutil.which("qgis_process")
    if program is None:
        return Finding(
            part=part, state="absent", found="not found", remedy="any computer with QGIS 3.22 or newer opens the maps"
        )
    return Finding(part=part, state="ok", found=program)


# --- models --------------------------------------------------------------------------------------------------------------


def _gpus() -> Iterator[Finding]:
    import torch

    part = "GPU"
    count = torch.cuda.device_count()
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        kinds = "float32, float16 and bfloat16" if torch.cuda.is_bf16_supported() else "float32 and float16"
        found = f"cuda:{number} {properties.name}, {properties.total_memory / 1e9:.0f} GB, {kinds}"
        yield Finding(part=part, state="ok", found=f"{found}; canopy map --device cuda uses it")
    if count:
        return
    cards = _nvidia_cards()
    if cards:
        built = torch.version.cuda
        why = (
            f"torch {torch.__version__} was built for CUDA {built}" if built else f"torch {torch.__version__} knows no CUDA"
        )
        remedy = "update the driver, or install the torch that fits it" if built else "install torch with CUDA"
        yield Finding(part=part, state="limited", found=f"{cards} is there, but torch cannot use it: {why}", remedy=remedy)
        return
    found = "none that torch can use; maps are made on the processor"
    yield Finding(part=part, state="absent", found=found, remedy="large regions and training want one")


def _nvidia_cards() -> str | None:
    """What the driver's own program says is there."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=True)  # noqa: S603
    except (subprocess.SubprocessError, OSError):  # a driver without its card: then there is none
        return None
    return ", ".join(told.stdout.split("\n")[:-1]) or None


def _models(model: str) -> Iterator[Finding]:
    from canopy.model.package import find_model, known_models, load_model

    part = "model"
    try:
        folder = find_model(model)
    except CanopyError as error:
        # Without the source checkout there is no sample model; whatever else is at hand can be tried by its name.
        yield Finding(part=part, state="limited", found=str(error), remedy="canopy models pull gets published weights")
        return
    import torch

    device = "cuda" if torch.cuda.device_count() else "cpu"
    try:
        loaded = load_model(folder, device)
        window_s = _window_s(loaded)
    except CanopyError as error:
        yield Finding(part=part, state="broken", found=str(error))
        return
    contract = loaded.contract
    stride_px = contract.stride_px
    km2_per_h = (stride_px * SHOWN_GSD_M) ** 2 / 1e6 / window_s * 3600
    found = (
        f"{contract.name} {contract.version} computes its fixture on {device}; about {km2_per_h:,.3g} km² an hour at "
        f"{SHOWN_GSD_M:g} m, one window at a time"
    )
    others = len(known_models()) - (folder.resolve() in {each.resolve() for each in known_models()})
    yield Finding(part=part, state="ok", found=found + (f"; {others} more in canopy models list" if others else ""))


def _window_s(model: Any) -> float:
    """Seconds a window takes, the best of some after one that warms up."""
    from canopy.mosaicker.batch import sample_windows

    images, taken = sample_windows(model.contract, 1), []
    for _ in range(_TIMED_WINDOWS + 1):
        start = time.perf_counter()
        model.predict(images).mean_m.sum().item()  # waits for the device
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


# --- extras --------------------------------------------------------------------------------------------------------------


_SYSTEMS: Final = (
    ("jobqueue", "dask_jobqueue", ("sbatch", "qsub", "bsub")), ("kubernetes", "dask_kubernetes", ("kubectl",)),
)  # fmt: skip
"""Extra of the package, the module it installs, and programs that mean a cluster of its kind is to be reached from here."""


def _clusters() -> Iterator[Finding]:
    for extra, module, programs in _SYSTEMS:
        part = f"clusters ({extra})"
        found = [program for program in programs if shutil.which(program)]
        install = f"pip install 'canopy-height[{extra}]'"
        match bool(found), importlib.util.find_spec(module) is not None:
            case True, True:
                yield Finding(
                    part=part, state="ok", found=f"{found[0]} is there; describe the cluster for canopy map --cluster"
                )
            case True, False:
                yield Finding(part=part, state="limited", found=f"{found[0]} is there, {module} is not", remedy=install)
            case _:
                yield Finding(part=part, state="absent", found=f"none of {', '.join(programs)} is there")


def _confinement() -> Finding:
    from canopy.score.sealed import confine

    part, means = "sealed benchmark", confine.means()
    if means == "none":
        found = "models that are handed in cannot be confined here, and results would say so"
        return Finding(part=part, state="limited", found=found, remedy="score on Linux 5.13 or newer with Landlock")
    return Finding(part=part, state="ok", found=f"models that are handed in are confined by {means}")


def _catalogues(names: Sequence[str]) -> Iterator[Finding]:
    """Whether what the descriptions of these sources name as their catalogues answers, each address asked once."""
    import requests

    from canopy.tiler.sources import find_source

    addresses: dict[str, list[str]] = {}
    for name in names:
        for address in _addresses(tomllib.loads(find_source(name).read_text(encoding="utf-8"))):
            addresses.setdefault(address, []).append(name)
    for address, users in addresses.items():
        part = f"catalogue of {', '.join(users)}"
        start = time.perf_counter()
        try:
            with requests.get(address, timeout=_ANSWER_S, stream=True) as answer:
                answer.raise_for_status()
        except requests.RequestException as error:
            found = f"{address} does not answer ({type(error).__name__})"
            yield Finding(part=part, state="limited", found=found, remedy="check the network, or map from local files")
            continue
        yield Finding(part=part, state="ok", found=f"{address} answers in {time.perf_counter() - start:.1f} s")


def _addresses(table: Any) -> Iterator[str]:
    """Every `endpoint` or `href` of a description that is a web address, however deep."""
    if isinstance(table, list):
        for each in table:
            yield from _addresses(each)
    if isinstance(table, dict):
        for key, value in table.items():
            if key in {"endpoint", "href"} and isinstance(value, str) and value.startswith(("http://", "https://")):
                yield value
            yield from _addresses(value)


def summary(findings: Sequence[Finding]) -> str:
    """The findings in a line."""
    broken = [finding.part for finding in findings if finding.state == "broken"]
    if broken:
        return f"{len(broken)} broken: {', '.join(broken)}"
    limited = [finding.part for finding in findings if finding.state == "limited"]
    return f"everything needed works{', with limits: ' if limited else ''}{', '.join(limited)}"
