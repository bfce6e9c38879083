"""The process that runs a submitted model: images in, one array of heights a chip out, and nothing else within reach.

Run as a script, with the model folder, the image folder, the output folder and the number of threads as arguments. It loads
the package from beside itself: the folder that holds the package may be anybody's, and is not within reach.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def predict_folder(model: Path, images: Path, out: Path) -> None:
    """Predict every image of a folder into `out`/NAME.npy, float32 metres, NaN where the model abstains or sees nothing.

    Raises:
        ContractError: the model folder is not sound, or the imagery is not what it was made for.
    """
    import numpy as np

    from canopy.model.evaluate import predict_chip
    from canopy.model.package import load_model
    from canopy.raster import read_raster

    loaded = load_model(model)
    for path in sorted(images.glob("*.tif")):
        pixels, grid = read_raster(path)
        loaded.contract.check_imagery(
            band_count=len(pixels.data), dtype=pixels.data.dtype.name, gsd_m=grid.gsd[0] * _metres(grid.crs)
        )
        image = np.where(pixels.valid, pixels.data, pixels.data.dtype.type(0))
        mean_m, _ = predict_chip(loaded, image, pixels.valid)
        np.save(out / f"{path.stem}.npy", np.where(pixels.valid, mean_m, np.float32(np.nan)).astype(np.float32))


def _metres(crs: object) -> float:
    return float(crs.axis_info[0].unit_conversion_factor)  # type: ignore[attr-defined]


def main() -> None:
    """The script."""
    model, images, out, threads = sys.argv[1:]
    package = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location(
        "canopy", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None and spec.loader is not None, f"{package} is no package"  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    sys.modules["canopy"] = module
    spec.loader.exec_module(module)

    import torch

    from canopy.errors import CanopyError

    torch.set_num_threads(int(threads))
    try:
        predict_folder(Path(model), Path(images), Path(out))
    except CanopyError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
