"""Tables of places: read from and written to the formats that GIS and statistics programs share, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from canopy.errors import AnalysisError, OutputError
from canopy.raster import delete
from canopy.region.layers import write_layer

if TYPE_CHECKING:
    import geopandas

SUFFIXES: Final = (".gpkg", ".parquet", ".geojson", ".csv")
"""What a table can be written to."""


def read_table(path: Path, layer: str | None = None) -> geopandas.GeoDataFrame:
    """A layer of places with its columns: GeoPackage, GeoJSON, Shapefile, GeoParquet or what else GDAL reads.

    Ids that a format keeps beside the columns, as GeoPackage does, become the column `fid`, unless they only count the rows.

    Raises:
        AnalysisError: missing or unreadable, without geometries or CRS, or with several layers of which none is chosen.
    """
    import geopandas
    import pyarrow as pa
    import pyogrio
    from pyogrio.errors import DataLayerError, DataSourceError

    if not path.exists():
        raise AnalysisError(f"{path} does not exist; check the path")
    parquet = path.suffix.lower() == ".parquet"
    if parquet and layer is not None:
        raise AnalysisError(f"{path} has one layer only; leave out --layer {layer}")
    try:
        if parquet:
            frame = geopandas.read_parquet(path)
        else:
            names = [str(name) for name in pyogrio.list_layers(path)[:, 0]]
            if layer is None and len(names) > 1:
                raise AnalysisError(f"{path} has the layers {', '.join(names)}; choose one with --layer")
            if layer is not None and layer not in names:
                raise AnalysisError(f"{path} has no layer {layer}, but {', '.join(names)}; choose one of these with --layer")
            frame = _with_ids(geopandas.read_file(path, layer=names[0] if layer is None else layer, fid_as_index=True))
    except (DataSourceError, DataLayerError, pa.ArrowInvalid, ValueError) as error:
        raise AnalysisError(f"{path} cannot be read; give GeoPackage, GeoJSON, Shapefile or GeoParquet") from error
    if not isinstance(frame, geopandas.GeoDataFrame) or frame.active_geometry_name is None:
        raise AnalysisError(f"{path} holds no geometry; give a layer of polygons")
    if frame.crs is None:
        raise AnalysisError(f"{path} has no CRS; assign the right one first")
    return frame


def _with_ids(frame: geopandas.GeoDataFrame) -> geopandas.GeoDataFrame:
    ids = frame.index.to_numpy()
    frame = frame.reset_index(drop=True)
    if (ids == range(len(ids))).all() or "fid" in {str(name).lower() for name in frame.columns}:
        return frame
    frame.insert(0, "fid", ids)
    return frame


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse a table that could not be written, before the work is done.

    Raises:
        AnalysisError: its suffix is none of `SUFFIXES`.
        OutputError: it exists and is not to be replaced, or its folder does not exist.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise AnalysisError(f"{out} is of no known format; choose a name that ends in {', '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise OutputError(f"the folder {out.parent} does not exist; make it first")
    if out.is_dir() or (out.exists() and not overwrite):
        raise OutputError(f"{out} exists; choose another name or pass --overwrite")


def write_table(frame: geopandas.GeoDataFrame, out: Path, layer: str) -> None:
    """Write a table in the format of its suffix; the same table gives the same bytes.

    GeoJSON is in longitude and latitude, as it has to be; the others are in the table's CRS. CSV has no geometries.

    Raises:
        OutputError: it cannot be written.
    """
    import pyogrio
    from pyogrio.errors import DataLayerError, DataSourceError, FeatureError

    suffix = out.suffix.lower()
    if suffix == ".gpkg":
        write_layer(out, frame, layer)
        return
    part = out.with_name(f".{out.name}.part{suffix}")
    try:
        delete(part)
        if suffix == ".parquet":
            frame.to_parquet(part, index=False)
        elif suffix == ".geojson":
            pyogrio.write_dataframe(frame.to_crs("EPSG:4326"), part, driver="GeoJSON", layer_options={"RFC7946": "YES"})
        else:
            frame.drop(columns=frame.active_geometry_name).to_csv(part, index=False)
        part.replace(out)
    except (DataLayerError, DataSourceError, FeatureError, OSError) as error:
        raise OutputError(f"cannot write {out} ({error}); free disk space or choose another folder") from error
    finally:
        delete(part)
