"""Vector layers of a map: GeoPackages that are whole or absent, and the same bytes whenever they are written.

area.gpkg     what was asked for, in the map's CRS; for a map without an area of interest the ground that its imagery covers
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from affine import Affine
from pyproj import CRS, Transformer

from canopy.errors import OutputError
from canopy.grid import Grid, Lattice
from canopy.raster import delete
from canopy.tiler.imagery import edges

if TYPE_CHECKING:
    import geopandas
    from shapely.geometry.base import BaseGeometry

    from canopy.region.plan import Plan, Scene

AREA: Final = "area.gpkg"
AREA_LAYER: Final = "area"

_EDGE_STEPS: Final = 16
"""Points per side of an image's outline that are carried into the map's CRS."""


def write_layer(path: Path, frame: geopandas.GeoDataFrame, layer: str) -> None:
    """Write a GeoPackage of one layer.

    Raises:
        OutputError: it cannot be written.
    """
    import pyogrio
    from pyogrio.errors import DataLayerError, DataSourceError, FeatureError

    from canopy.mosaicker.gti import GPKG_VERSION, undated

    part = path.with_name(f".{path.name}")
    journal = part.with_name(f"{part.name}-journal")
    try:
        # A run that was killed leaves its part, and a GeoPackage written over another one counts its changes.
        delete(part, journal)
        with undated():
            pyogrio.write_dataframe(frame, part, layer=layer, driver="GPKG", VERSION=GPKG_VERSION)
        part.replace(path)
    except (DataLayerError, DataSourceError, FeatureError, OSError) as error:
        raise OutputError(f"cannot write {path} ({error}); free disk space or choose another folder") from error
    finally:
        delete(part, journal)


def write_area(out: Path, plan: Plan) -> None:
    """Write `area.gpkg` into a folder.

    Raises:
        OutputError: it cannot be written.
    """
    import geopandas

    names, polygons = _asked_for(plan)
    frame = geopandas.GeoDataFrame({"name": names}, geometry=polygons, crs=plan.lattice.crs)
    write_layer(out / AREA, frame, AREA_LAYER)


def _asked_for(plan: Plan) -> tuple[list[str], list[BaseGeometry]]:
    import shapely

    if plan.polygons is not None:
        assert plan.area is not None, "polygons of no area"
        return [plan.area.name] * len(plan.polygons), [*plan.polygons]
    whole = shapely.box(*plan.lattice.grid(plan.extent).bounds)
    scenes = plan.imagery.scenes
    if not scenes:
        return ["the whole imagery"], [whole]
    return ["the whole imagery"], [shapely.union_all(_outlines(scenes, plan.lattice)).intersection(whole)]


def _outlines(scenes: Sequence[Scene], lattice: Lattice) -> list[BaseGeometry]:
    """The edges of images in the lattice's CRS; a CRS takes longer to look up than a thousand edges."""
    import shapely

    crss = {name: CRS.from_user_input(name) for name in {scene.crs for scene in scenes}}
    ways = {name: Transformer.from_crs(crs, lattice.crs, always_xy=True) for name, crs in crss.items()}
    straight = {name for name, crs in crss.items() if crs == lattice.crs}
    found = []
    for scene in scenes:
        grid = Grid(crs=crss[scene.crs], transform=Affine(*scene.transform), shape=scene.shape)
        # In its own CRS an edge is straight.
        steps = 2 if scene.crs in straight else _EDGE_STEPS
        xs, ys = ways[scene.crs].transform(*edges(grid, steps))
        top, bottom, left, right = np.stack([xs, ys], axis=-1).reshape(4, steps, 2)
        found.append(shapely.Polygon(np.concatenate([top, right, bottom[::-1], left[::-1]])))
    return found
