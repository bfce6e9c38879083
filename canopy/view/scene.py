"""What is viewed: a finished map, its layers, and what the page is told of them."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from canopy.errors import CanopyError, ViewError
from canopy.region.folder import RegionFolder
from canopy.region.shift import shift_line
from canopy.tiler.imagery import ImageFiles
from canopy.view.flags import flagged_sheets
from canopy.view.heights import MapBand, Reference, pixel_at
from canopy.view.imagery import ImageryPainter
from canopy.view.layers import (
    DATE_STYLE,
    Layer,
    Painter,
    date_layer,
    difference_layer,
    error_layer,
    height_layer,
    hillshade_layer,
    reference_layer,
)
from canopy.view.point import PointValues, State, as_iso, known
from canopy.view.pools import Pools
from canopy.view.reduced import ReducedLevels, lacks_overviews
from canopy.view.tiles import LON_LAT, TILE_PX, Tile, TileSource, native_zoom, transformer

if TYPE_CHECKING:
    from canopy.score.reference import GivenReference

UNCALIBRATED = "The map is uncalibrated: how wrong its heights may be was not measured."


class Scene:
    """A finished map, open for a web server; usable by many threads at once.

    Args:
        folder: The map.
        reference: Heights to hold it against.
        basemap: Address of the tiles of a base map, with {z}, {x} and {y}.
        attribution: Who is to be named for it.

    Raises:
        CanopyError: the map, its records or the reference cannot be read.
    """

    def __init__(
        self,
        folder: RegionFolder,
        *,
        reference: GivenReference | None = None,
        basemap: str | None = None,
        attribution: str | None = None,
    ) -> None:
        self.folder = folder
        self.basemap = basemap
        self.attribution = attribution
        self.pools = Pools()
        self._notices: list[str] = []
        self._scratch = tempfile.TemporaryDirectory(prefix="canopy-view-")
        try:
            self._height = self._source(folder.height)
            self._error = None if folder.error is None else self._source(folder.error)
            self._reference, self._reference_name = self._opened(reference)
            self.layers = {layer.id: layer for layer in self._all_layers()}
            self._description = self._described()
        except BaseException:
            self.close()
            raise

    # --- layers ------------------------------------------------------------------------------------------------------------

    def _source(self, path: Path, crs: Any = None, *, alpha_is_mask: bool = True) -> TileSource:
        """A raster for tiles, with overviews of its own or, when they are needed, with those that are made."""
        source = TileSource.of(path, crs)
        if not lacks_overviews(source):
            return source
        folder = Path(tempfile.mkdtemp(dir=self._scratch.name))
        return replace(source, more=ReducedLevels(source, folder, alpha_is_mask=alpha_is_mask))

    def _opened(self, given: GivenReference | None) -> tuple[Reference | None, str]:
        if given is None:
            return None, ""
        from canopy.score.reference import open_reference

        with self.pools.pool() as pool:
            opened = open_reference(given, pool)
        sources = tuple(self._source(file.path, file.grid.crs) for file in opened.rasters.files)
        reference = Reference(sources=sources, metres=opened.rasters.metres, band=given.band)
        left, bottom, right, top = self._height.bounds
        if not any(
            s.bounds[0] < right and s.bounds[2] > left and s.bounds[1] < top and s.bounds[3] > bottom for s in sources
        ):
            raise ViewError(
                f"the reference {opened.name} lies nowhere on the map {self.folder.path}; check its CRS and place"
            )
        return reference, Path(opened.name).name

    def _all_layers(self) -> list[Layer]:
        """The lowest first."""
        heights = MapBand(source=self._height, band=1)
        own = self._facts([self._height])
        layers = [*self._imagery(), height_layer(heights, **own)]
        if self._reference is not None:
            facts = self._facts(self._reference.sources)
            layers.append(reference_layer(self._reference, self._reference_name, **facts))
            both = {"max_zoom": max(own["max_zoom"], facts["max_zoom"]), "version": own["version"] + facts["version"]}
            layers.append(difference_layer(heights, self._reference, **both))
        if self._error is not None:
            errors = MapBand(source=self._error, band=1)
            layers.append(error_layer(errors, calibrated=self._is_calibrated, **self._facts([self._error])))
        style = self.folder.path / DATE_STYLE
        if self.folder.date is not None and style.is_file():
            dates = TileSource.of(self.folder.date)
            layers.append(date_layer(dates, style, **self._facts([dates])))
        return [*layers, hillshade_layer(heights, **own)]

    def _imagery(self) -> list[Layer]:
        told = [] if self.folder.run is None else self.folder.run.get("imagery", {}).get("files", [])
        local = sum("path" in entry for entry in told)
        there = self.folder.images
        if local > len(there):
            self._notices.append(
                f"{local - len(there)} of the {local} images that the map was made of are gone from where they were: what "
                f"they show is missing in the layer of imagery."
            )
        elif told and not local:
            self._notices.append("The imagery came from a catalogue and is not on this computer; it is not shown.")
        if not there:
            return []
        try:
            images = ImageFiles(there)
            info = images.info
            sources = tuple(
                self._source(file.path, file.grid.crs, alpha_is_mask=info.alpha == "mask") for file in info.files
            )
            painter = ImageryPainter.of(images, sources)
        except CanopyError as error:  # the map is as good as before
            self._notices.append(f"The imagery is not shown: {error}")
            return []
        return [
            Layer(id="imagery", title="Imagery", kind="image", painter=painter, note=painter.note, **self._facts(sources))
        ]

    def _facts(self, sources: Sequence[TileSource]) -> dict[str, Any]:
        """The finest zoom of a layer, and what tells its files from others."""
        digest = hashlib.sha256()
        for source in sources:
            status = source.path.stat()
            digest.update(f"{source.path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return {"max_zoom": native_zoom(min(source.pixel_m for source in sources)), "version": digest.hexdigest()[:16]}

    def prepare(self) -> None:
        """Make the overviews that files lack, in the background, so that whoever shows their layer waits less."""
        painters = [layer.painter for layer in self.layers.values()]
        sources = [self._height, *(self._reference.sources if self._reference is not None else ())]
        sources += [source for each in painters if isinstance(each, ImageryPainter) for source in each.sources]
        wanted = [source.more for source in sources if source.more is not None]

        def make() -> None:
            for more in wanted:
                try:
                    more()
                except (CanopyError, OSError):  # said again to whoever asks for a tile of it, if anybody still does
                    continue

        if wanted:
            threading.Thread(target=make, name="overviews", daemon=True).start()

    # --- answers -----------------------------------------------------------------------------------------------------------

    @property
    def _is_calibrated(self) -> bool:
        return self.folder.calibrated is not None

    @cached_property
    def bounds_deg(self) -> tuple[float, float, float, float]:
        """(west, south, east, north) of the map."""
        grid = self.folder.grid
        west, south, east, north = transformer(grid.crs, LON_LAT).transform_bounds(*grid.bounds, densify_pts=21)
        return west, south, east, north

    def description(self) -> dict[str, Any]:
        """What the page is told; its addresses are relative, so that it also works behind a proxy."""
        return self._description

    def _described(self) -> dict[str, Any]:
        folder, run = self.folder, self.folder.run or {}
        notices = list(self._notices)
        if not self._is_calibrated:
            notices.insert(0, UNCALIBRATED)
        elif (shift := run.get("shift")) and (line := shift_line(shift)):
            notices.insert(0, f"{line[0].upper()}{line[1:]}.")
        models = [f"{model['name']} {model['version']}" for model in run.get("models", [])]
        return {
            "name": folder.path.resolve().name,
            "bounds_deg": self.bounds_deg,
            "gsd_m": folder.grid.gsd[0],
            "crs": folder.grid.crs.to_string(),
            "model": ", ".join(models) or None,
            "date": folder.days,
            "calibrated": self._is_calibrated,
            "calibration": folder.tags.get("CANOPY_CALIBRATION", "not said"),
            "coverage": self._coverage(),
            "basemap": self.basemap,
            "attribution": self.attribution,
            "layers": [_layer(layer) for layer in self.layers.values()],
            "notices": notices,
            "flagged": flagged_sheets(folder.path) if run.get("shift", {}).get("sheets_flagged") else None,
        }

    def _coverage(self) -> float | None:
        """Share of known heights that the intervals held where that was measured, the first way that was."""
        calibrated = self.folder.calibrated
        if calibrated is None or not calibrated.pixels.measured:
            return None
        return known(calibrated.pixels.measured[0].overall)

    def tile(self, layer: Layer, tile: Tile) -> bytes | None:
        """A tile of a layer as PNG; None where there is nothing.

        Raises:
            RasterError: a file is damaged or gone.
        """
        painter: Painter = layer.painter
        with self.pools.pool() as pool:
            return painter.png(tile, pool)

    def point(self, lon_deg: float, lat_deg: float) -> PointValues:
        """What the map says of a place.

        Raises:
            RasterError: a file is damaged or gone.
        """
        place = pixel_at(self.folder.grid, lon_deg, lat_deg)
        if place is None:
            return PointValues(lon=lon_deg, lat=lat_deg, state="outside")
        x, y, row, col = place
        with self.pools.pool() as pool:
            (height_m,) = self._pixel(pool, self.folder.height, row, col)
            found: dict[str, Any] = {"height_m": height_m, "date": self.folder.days}
            if self.folder.error is not None:
                names = ("error_90_m", "lower_90_m", "upper_90_m")
                found |= dict(zip(names, self._pixel(pool, self.folder.error, row, col), strict=True))
            if self.folder.date is not None:
                (day,) = self._pixel(pool, self.folder.date, row, col)
                found["date"] = None if day is None else as_iso(int(day))
            if self._reference is not None:
                found["reference_m"] = self._reference.at(lon_deg, lat_deg, pool)
        state: State = "unknown" if height_m is None else "known"
        return PointValues(lon=lon_deg, lat=lat_deg, x=x, y=y, row=row, col=col, state=state, **found)

    @staticmethod
    def _pixel(pool: Any, path: Path, row: int, col: int) -> list[float | None]:
        """The values of the bands of one pixel."""
        pixels = pool.get(path).read(row, col, (1, 1))
        return [known(float(value)) for value in np.asarray(pixels.data[:, 0, 0], np.float64)]

    def close(self) -> None:
        """Close all files and delete what was made; no thread may be reading."""
        self.pools.close()
        self._scratch.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _layer(layer: Layer) -> dict[str, Any]:
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
