"""Small files that are there whole or not at all."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from canopy.errors import OutputError


def write_text(path: Path, text: str) -> None:
    """Write a small text file in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file, whole or not at all; several machines may write it at the same time.

    Raises:
        OutputError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):  # there may be none, and on a read-only volume that is an error of another kind
            part.unlink()
        raise OutputError(f"cannot write {path} ({error.strerror}); free disk space or choose another folder") from error
