"""What all tests share: how many examples Hypothesis tries, the real samples, a small disk, a model that costs nothing."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from tests.servers import file_server, serve_folder, stac_api  # noqa: F401 - fixtures for all tests

# Time limits per example would fail on a busy machine without saying anything about the code.
settings.register_profile("default", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), max_examples=1000, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of real samples; the test skips, with the reason, where there is none."""
    folder = os.environ.get("CANOPY_SAMPLES", "")
    if not folder:
        pytest.skip("CANOPY_SAMPLES is not set: no real samples on this machine")
    if not Path(folder).is_dir():
        pytest.fail(f"CANOPY_SAMPLES={folder} is not a folder; unset it to skip the tests on real samples")
    return Path(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a real file system of so many bytes, mounted for the test; skips where that needs rights we lack."""
    mounted: list[Path] = []

    def mount(size_bytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        program = shutil.which("mount")
        if program is None:
            pytest.skip("no mount program: a full disk cannot be made here")
        done = subprocess.run(
            [program, "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights: what `canopy map` does around a model does not depend on its skill."""
    import torch

    from canopy.model.distribution import Bins
    from canopy.model.network import HeightNetwork, NetworkConfig
    from canopy.model.package import Contract, Training, save_model

    config = NetworkConfig(
        backbone="vit_tiny_patch16_224",
        backbone_options={"depth": 4, "embed_dim": 32, "num_heads": 2},
        decoder_channels=8, head_channels=8, bins=Bins(count=8, max_m=40.0),
    )  # fmt: skip
    contract = Contract(
        name="tiny", version="0", description="random weights, for tests", licence="Apache-2.0", network=config,
        bands=("red", "green", "blue"), gsd_range_m=(0.25, 2.0), dtype="uint8", value_range=(0, 255),
        mean=(100.0, 100.0, 100.0), std=(60.0, 60.0, 60.0), window_px=64, stride_px=48,
        training=Training(sites=("nowhere",), tile_sets={}, recipe_sha256="0" * 64, footprints_deg=()),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)  # the initial values draw from the global generator; it is put back afterwards
        network = HeightNetwork(config).eval()
        for parameter in network.parameters():  # the head starts at zero, and a constant map would hide every mistake
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    image = np.random.default_rng(7).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    return save_model(
        tmp_path_factory.mktemp("models") / "tiny", network=network, contract=contract, card="# tiny\n", fixture_image=image
    )
