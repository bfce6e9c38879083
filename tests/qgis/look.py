"""What QGIS says of a map, as JSON; run by the interpreter that QGIS is installed for, which has nothing of canopy.

    python look.py < question.json > answer.json

The question names a project or rasters, points to identify at, and pictures to draw.
"""

import json
import os
import sys

from qgis.core import (
    QgsApplication,
    QgsLayerTreeGroup,
    QgsMapRendererSequentialJob,
    QgsMapSettings,
    QgsPointXY,
    QgsProject,
    QgsRaster,
    QgsRasterLayer,
    QgsRectangle,
)
from qgis.PyQt.QtCore import QSize
from qgis.PyQt.QtGui import QColor


def tree(node):
    """The legend's groups and layers, from the top."""
    if isinstance(node, QgsLayerTreeGroup):
        return {
            "group": node.name(),
            "shown": node.itemVisibilityChecked(),
            "members": [tree(child) for child in node.children()],
        }
    return {"layer": node.layerId(), "shown": node.itemVisibilityChecked()}


def style(layer):
    """Kind of renderer, and label and colour of each class."""
    renderer = layer.renderer()
    if isinstance(layer, QgsRasterLayer):
        symbols = [[label, colour.name()] for label, colour in renderer.legendSymbologyItems()]
    else:
        symbols = [
            [item.label(), item.symbol().color().name() if item.symbol() else None] for item in renderer.legendSymbolItems()
        ]
    return {"renderer": renderer.type(), "symbols": symbols}


def told(layer):
    crs = layer.crs()
    extent = layer.extent()
    return {
        "id": layer.id(), "name": layer.name(), "valid": layer.isValid(), "source": layer.source(), "crs": crs.authid(),
        "extent": [extent.xMinimum(), extent.yMinimum(), extent.xMaximum(), extent.yMaximum()],
        "abstract": layer.metadata().abstract(),
        "features": None if isinstance(layer, QgsRasterLayer) else layer.featureCount(),
        **(style(layer) if layer.isValid() else {}),
    }  # fmt: skip


def identify(layer, points):
    """Band -> value at each point; null where there is none."""
    found = [layer.dataProvider().identify(QgsPointXY(x, y), QgsRaster.IdentifyFormatValue).results() for x, y in points]
    return [{str(band): value for band, value in each.items()} for each in found]


def draw(layers, crs, picture):
    """Draw layers, the first on top, into a PNG."""
    settings = QgsMapSettings()
    settings.setLayers(layers)
    settings.setDestinationCrs(crs)
    settings.setBackgroundColor(QColor(picture["background"]))
    settings.setExtent(QgsRectangle(*picture["extent"]))
    settings.setOutputSize(QSize(*picture["size"]))
    settings.setOutputDpi(96)
    settings.setFlag(QgsMapSettings.Antialiasing, False)
    job = QgsMapRendererSequentialJob(settings)
    job.start()
    job.waitForFinished()
    job.renderedImage().save(picture["file"], "PNG")
    return [error.message for error in job.errors()]


def main():
    question = json.load(sys.stdin)
    answer = {}
    if "project" in question:
        project = QgsProject.instance()
        answer["read"] = project.read(question["project"])
        layers = project.mapLayers()
        answer["layers"] = {key: told(layer) for key, layer in layers.items()}
        answer["tree"] = tree(project.layerTreeRoot())["members"]
        answer["order"] = [layer.id() for layer in project.layerTreeRoot().layerOrder()]
        answer["title"], answer["crs"] = project.title(), project.crs().authid()
        answer["abstract"] = project.metadata().abstract()
        view = project.viewSettings().defaultViewExtent()
        answer["view"] = [view.xMinimum(), view.yMinimum(), view.xMaximum(), view.yMaximum()]
        crs = project.crs()
    else:
        layers = {path: QgsRasterLayer(path, path) for path in question["rasters"]}
        answer["layers"] = {key: told(layer) for key, layer in layers.items()}
        crs = next(iter(layers.values())).crs()
    answer["identified"] = {key: identify(layers[key], points) for key, points in question.get("points", {}).items()}
    answer["errors"] = [draw([layers[key] for key in each["layers"]], crs, each) for each in question.get("pictures", [])]
    return answer


application = QgsApplication([], False)
application.initQgis()
json.dump(main(), sys.stdout)
sys.stdout.flush()
# QGIS may crash when the interpreter takes its objects apart in another order than it made them.
os._exit(0)
