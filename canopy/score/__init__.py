"""Maps of canopy height against what is known of the ground: lidar, GEDI and ICESat-2 shots, plots."""
