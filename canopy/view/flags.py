"""Sheets of a map that look unlike the calibration data, as GeoJSON for the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from pyproj import CRS

from canopy.errors import OutputError
from canopy.region.shift import LAYER
from canopy.view.tiles import LON_LAT, transformer


def flagged_sheets(out: Path) -> dict[str, Any] | None:
    """The flagged sheets of a map in longitude and latitude; None where none is, or none was measured.

    Raises:
        OutputError: their file is damaged.
    """
    path = out / LAYER
    if not path.is_file():
        return None
    import shapely
    from pyogrio.raw import read as read_layer

    try:
        meta, _, shapes, columns = read_layer(path, columns=["sheet", "share", "flagged"])
    except (RuntimeError, ValueError) as error:
        raise OutputError(f"{path} cannot be read ({error}); make the map again, or delete the file") from error
    fields = dict(zip(meta["fields"], columns, strict=True))
    to_degrees = transformer(CRS.from_user_input(meta["crs"]), LON_LAT)
    features = []
    for wkb, sheet, share, flag in zip(shapes, fields["sheet"], fields["share"], fields["flagged"], strict=True):
        if flag == 1:
            outline = shapely.transform(shapely.from_wkb(wkb), lambda xy: _carried(to_degrees, xy))
            features.append({
                "type": "Feature", "properties": {"sheet": str(sheet), "share": float(share)},
                "geometry": json.loads(shapely.to_geojson(outline)),
            })  # fmt: skip
    return {"type": "FeatureCollection", "features": features} if features else None


def _carried(to_degrees: Any, xy: Any) -> Any:
    return np.stack(to_degrees.transform(xy[:, 0], xy[:, 1]), axis=1)
