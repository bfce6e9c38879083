"""From windows of predictions to cloud-optimized height and error maps."""
