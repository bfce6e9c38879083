"""What analysts do with finished maps: statistics of polygons, and change between two dates."""
