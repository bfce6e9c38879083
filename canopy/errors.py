"""What can be wrong with a user's input, as exceptions that the command line prints in one line.

A message names the value, the limit it broke and the remedy. Broken internal invariants are `assert`s, never these.
"""


class CanopyError(Exception):
    """Bad input or an unusable environment; the message is one line with the value, the limit and the remedy."""


class GridError(CanopyError):
    """A CRS, transform, window or sheet layout that cannot work."""


class RasterError(CanopyError):
    """A raster that cannot be read or written as asked."""


class NoCrsError(RasterError):
    """A raster that does not say where on Earth it is."""


class LidarError(CanopyError):
    """A point cloud that cannot be turned into heights."""


class NoPointsError(LidarError):
    """A point cloud without a usable point where heights are asked for."""


class RecipeError(CanopyError):
    """A recipe (TOML) with an unknown key, a wrong value or a missing file."""


class ContractError(CanopyError):
    """Imagery that a model must not be given, or a model folder that does not hold what its contract says."""


class DeviceMemoryError(CanopyError):
    """A device without the memory for what it is asked to compute; fewer windows at once may fit."""


class OutputError(CanopyError):
    """An output folder or file that cannot be written without losing something."""


class RegionError(CanopyError):
    """Sheets of a region that could not be made; the others are kept."""


class ClusterError(CanopyError):
    """Workers that cannot be had, or that died."""


class AreaError(CanopyError):
    """An area of interest that is empty, unreadable or off the imagery."""


class SourceError(CanopyError):
    """A source that is described wrongly, or a catalogue that does not hold what is asked of it."""


class ImageryError(CanopyError):
    """Imagery that a service does not deliver, or that is not what its catalogue says."""


class AuditError(CanopyError):
    """A table of chips that cannot be audited."""


class SealError(CanopyError):
    """A sealed task, its key and a submission that do not hold together."""


class ScoreError(CanopyError):
    """A map and a reference that cannot be compared, or must not be."""


class AnalysisError(CanopyError):
    """A question that the maps at hand cannot answer, or must not be asked."""


class ViewError(CanopyError):
    """A web map that cannot be served as asked, or a question to it that it does not answer."""
