"""From imagery and LiDAR to training chips on one lattice."""
