"""What building the package does besides collecting its files: it puts MapLibre GL beside the page of `canopy view`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def _maplibre(root: Path) -> ModuleType:
    """The module by its file: the package itself cannot be imported before it is installed."""
    spec = importlib.util.spec_from_file_location("maplibre", root / "canopy" / "view" / "maplibre.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class MapLibreHook(BuildHookInterface):
    """Fetches MapLibre GL for a wheel and for an installation in place; without network the rest is built all the same."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling names them
        """Called by hatchling before it collects the files of a wheel (`version` is standard or editable)."""
        maplibre = _maplibre(Path(self.root))
        try:
            maplibre.fetch()
        except maplibre.DownloadError as error:
            self.app.display_warning(f"{error}; canopy view will not work until {maplibre.COMMAND} has run")
            return
        folder = maplibre.FOLDER.relative_to(self.root).as_posix()
        build_data["artifacts"].append(f"/{folder}/*")
