"""What is viewed: a finished map, its layers, and what the page is told of them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from pyproj import Transformer

from canopy.region.folder import RegionFolder
from canopy.view.handles import Handles
from canopy.view.layers import Layer, error_layer, height_layer, hillshade_layer
from canopy.view.point import PointValues, at
from canopy.view.tiles import native_zoom


class Scene:
    """A finished map, open."""

    def __init__(self, folder: RegionFolder, *, basemap: str | None = None, attribution: str | None = None) -> None:
        self.folder = folder
        self.basemap = basemap
        self.attribution = attribution
        self._height = Handles(folder.height)
        self._error = None if folder.error is None else Handles(folder.error)

    @cached_property
    def bounds_deg(self) -> tuple[float, float, float, float]:
        """(west, south, east, north) of the map."""
        grid = self.folder.grid
        transformer = Transformer.from_crs(grid.crs, "EPSG:4326", always_xy=True)
        west, south, east, north = transformer.transform_bounds(*grid.bounds, densify_pts=21)
        return west, south, east, north

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """By their ids, the lowest first."""
        _, south, _, north = self.bounds_deg
        zoom = native_zoom(self.folder.grid.gsd[0], max(abs(south), abs(north)))
        layers = [height_layer(self._height, zoom)]
        if self._error is not None:
            layers.append(error_layer(self._error, zoom, calibrated=self.folder.calibrated is not None))
        layers.append(hillshade_layer(self._height, zoom))
        return {layer.id: layer for layer in layers}

    def description(self) -> dict[str, Any]:
        """What the page is told; addresses are relative, so that it also works behind a proxy."""
        folder = self.folder
        calibrated = folder.calibrated is not None
        models = [] if folder.run is None else folder.run.get("models", [])
        return {
            "name": folder.path.resolve().name,
            "bounds_deg": self.bounds_deg,
            "gsd_m": folder.grid.gsd[0],
            "crs": folder.grid.crs.to_string(),
            "model": ", ".join(f"{model['name']} {model['version']}" for model in models) or None,
            "date": None,
            "calibrated": calibrated,
            "calibration": folder.tags.get("CANOPY_CALIBRATION", "not said"),
            "coverage": None,
            "basemap": self.basemap,
            "attribution": self.attribution,
            "layers": [_described(layer) for layer in self.layers.values()],
            "notices": [] if calibrated else ["The map is uncalibrated: its intervals promise nothing."],
            "flagged": None,
        }

    def point(self, lon_deg: float, lat_deg: float) -> PointValues:
        """What the map says of a place."""
        return at(lon_deg, lat_deg, grid=self.folder.grid, height=self._height, error=self._error, date=None)

    def close(self) -> None:
        """Close all files."""
        for handles in (self._height, self._error):
            if handles is not None:
                handles.close()


def _described(layer: Layer) -> dict[str, Any]:
    from canopy.view.tiles import TILE_PX

    return {
        "id": layer.id,
        "title": layer.title,
        "kind": layer.kind,
        "tiles": f"tiles/{layer.id}/{{z}}/{{x}}/{{y}}.png",
        "min_zoom": 0,
        "max_zoom": layer.max_zoom,
        "tile_px": TILE_PX,
        "opacity": layer.opacity,
        "visible": layer.visible,
        "legend": [{"colour": entry.colour, "label": entry.label} for entry in layer.legend],
        "note": layer.note,
    }
