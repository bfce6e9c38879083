"""The web server of a map: addresses to calls, results to JSON and PNG. Only the layers of one map can be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from canopy.view.point import PointValues
from canopy.view.scene import Scene
from canopy.view.tiles import Tile

PAGE: Final = Path(__file__).parent / "page"

TYPES: Final = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".svg": "image/svg+xml", ".png": "image/png"}
"""What the page may consist of."""


def create_app(scene: Scene) -> FastAPI:
    """The server of a map."""
    app = FastAPI(title="canopy view", docs_url=None, redoc_url=None, openapi_url=None)
    assets = {path.name: path for path in sorted(PAGE.rglob("*")) if path.suffix in TYPES and path.is_file()}

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"detail": f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"}, status_code=422)

    @app.get("/")
    def page() -> Response:
        return asset("index.html")

    @app.get("/assets/{name}")
    def asset(name: str) -> Response:
        if name not in assets:
            raise HTTPException(404, "no such file of the page")
        path = assets[name]
        return Response(path.read_bytes(), media_type=TYPES[path.suffix])

    @app.get("/map.json")
    def description() -> dict[str, Any]:
        return scene.description()

    @app.get("/tiles/{layer}/{z}/{x}/{y}.png")
    def tile(layer: str, z: int, x: int, y: int) -> Response:
        found = scene.layers.get(layer)
        if found is None:
            raise HTTPException(404, f"there is no layer of this name; there are {', '.join(scene.layers)}")
        if not 0 <= z <= found.max_zoom:
            raise HTTPException(404, f"zoom {z} is not one of 0 to {found.max_zoom}")
        if not (0 <= x < 1 << z and 0 <= y < 1 << z):
            raise HTTPException(404, f"there is no tile {x}/{y} at zoom {z}; each counts from 0 to {(1 << z) - 1}")
        png = found.painter.png(Tile(zoom=z, x=x, y=y))
        return Response(status_code=204) if png is None else Response(png, media_type="image/png")

    @app.get("/point")
    def point(
        lon: Annotated[float, Query(ge=-180, le=180, allow_inf_nan=False)],
        lat: Annotated[float, Query(ge=-90, le=90, allow_inf_nan=False)],
    ) -> PointValues:
        return scene.point(lon, lat)

    return app
