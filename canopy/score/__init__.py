"""Maps of canopy height against what is known of the ground: lidar, GEDI and ICESat-2 shots, plots."""

from canopy.score.maps import GivenMap
from canopy.score.reference import GivenReference
from canopy.score.result import ScoreResult, read_result
from canopy.score.run import References, score_map
from canopy.score.shots import ShotSettings
from canopy.score.strata import Strata

__all__ = ["GivenMap", "GivenReference", "References", "ScoreResult", "ShotSettings", "Strata", "read_result", "score_map"]
