"""The calibration tables of one way of predicting, as a value and as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from canopy.errors import ContractError
from canopy.model.blocks import BlockTable
from canopy.model.calibration import CalibrationTable
from canopy.textfile import write_text

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Member(BaseModel):
    """A model that took part in the predictions."""

    model_config = _FROZEN

    name: str
    version: str
    weights_sha256: str


class Calibrated(BaseModel):
    """The tables of one way of predicting: these models, shown windows in these turns.

    A single model that sees windows as they are has its tables in its contract; any other way has a file of its own.
    """

    model_config = _FROZEN

    format: Literal[1] = 1
    members: tuple[Member, ...] = Field(min_length=1)
    tta: str
    """Test-time augmentation."""
    tile_sets: dict[str, str]
    """Name of each tile set that calibrated -> SHA-256 of its index."""
    pixels: CalibrationTable
    blocks: BlockTable | None
    """None: too few squares of ground to say how wrong means are."""

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Calibrated:
        """Read such a file.

        Raises:
            ContractError: it is missing, or not one that this version reads.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ContractError(
                f"{path} cannot be read ({error.strerror}); make it with canopy calibrate … --out {path}"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise ContractError(f"{path}: {where}: {first['msg']}; make it with canopy calibrate … --out {path}") from error
