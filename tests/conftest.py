"""Settings shared by all tests: how many examples Hypothesis tries, and where the real samples are."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

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
