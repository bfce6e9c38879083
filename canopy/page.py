"""Pages that hold everything: one HTML file with its style, figures and data inside, and the look that they share.

Such a page can be mailed, opened from a disk without network, printed, and read on a phone. Each part of the package that
makes one has its own template, which takes the style in with `{% include "page.css" %}`. Colours are those of Okabe and Ito
(2008), which all common kinds of colour vision tell apart; every colour has a shape or a word beside it.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from canopy.raster import Pixels

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURE_WIDTH_IN: Final = 6.4
DPI: Final = 140


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A figure as it stands on a page."""

    name: str
    """What a file of it would be called, without its ending."""
    title: str
    alt: str
    """What it shows, for those who do not see it."""
    png: bytes

    @property
    def data(self) -> str:
        """The figure as the address of an image that needs no file."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


# --- figures -------------------------------------------------------------------------------------------------------------


def png_of(figure: Figure) -> bytes:
    """A figure of matplotlib as the bytes of a PNG, the same bytes whenever it is drawn with the same version."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def plain_axes(height_in: float = 3.6, width_in: float = FIGURE_WIDTH_IN) -> tuple[Figure, Axes]:
    """A figure with one set of plain axes; it belongs to no window and needs no closing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    axes = figure.subplots()
    plain(axes)
    return figure, axes


def plain(axes: Axes) -> None:
    """Take from axes what says nothing: the box above and to the right, and a grid in front of the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)


# --- pictures of pixels --------------------------------------------------------------------------------------------------


def photograph(image: Pixels) -> NDArray[np.uint8]:
    """(row, col, 3) of the first three bands (or the only one); more than 8 bits are stretched from 2 to 98 per cent."""
    bands = image.data[:3] if len(image.data) >= 3 else np.repeat(image.data[:1], 3, axis=0)
    colours = np.moveaxis(bands, 0, -1)
    if colours.dtype != np.uint8:
        known = colours[image.valid] if image.valid.any() else colours.reshape(-1, 3)
        low, high = np.percentile(known, [2, 98])
        colours = (255 * np.clip((colours - low) / max(high - low, 1e-9), 0, 1)).astype(np.uint8)
    return np.where(image.valid[..., None], colours, np.uint8(255))


def enlarge(values: NDArray[Any], side_px: int) -> NDArray[Any]:
    """Nearest neighbours to about `side_px` along the longer side: pixels stay pixels, for pictures only."""
    longer = max(values.shape[:2])
    if longer <= side_px:
        factor = max(1, round(side_px / longer))
        return np.repeat(np.repeat(values, factor, axis=0), factor, axis=1)
    rows, cols = (np.linspace(0, n - 1, round(n * side_px / longer)).round().astype(np.intp) for n in values.shape[:2])
    return values[np.ix_(rows, cols)]


def photograph_uri(colours: NDArray[np.uint8]) -> str:
    """(row, col, 3) colours as the address of a JPEG that needs no file; for photographs, which make large PNGs."""
    return _uri(colours, "jpeg", {"quality": 85})


def pixels_uri(colours: NDArray[np.uint8]) -> str:
    """(row, col, 3) colours as the address of a PNG that needs no file: for few pixels that the page enlarges."""
    return _uri(colours, "png", {"optimize": True})


def _uri(colours: NDArray[np.uint8], kind: str, options: dict[str, Any]) -> str:
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, np.ascontiguousarray(colours), format=kind, pil_kwargs=options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- the page ------------------------------------------------------------------------------------------------------------


def render_page(package: str, template: str, **values: Any) -> str:
    """A page from a template of a package; what is put in is text unless the template says otherwise, never markup.

    Args:
        package: Where the template lies, such as `canopy.tiler`.
        template: Its file name.
        values: What it names. One that it names and that is not here is an error, not an empty place.
    """
    return str(_environment(package).get_template(template).render(**values))


@cache
def _environment(package: str) -> Environment:
    """One for each package, because compiling a template takes longer than filling it in."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("canopy", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def json_for_html(value: Any) -> str:
    """JSON that may stand inside <script>: no character of it ends the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
