"""MapLibre GL, which draws the map in the browser, put beside the page from its npm package.

It is no part of the repository: building the package, `pip install -e .` and `make` fetch it, and a wheel carries it, so
that the page asks no other computer for anything. By hand it is `python -m canopy.view.maplibre`. The package is read as
one archive from the registry that `npm_config_registry` names, or else npm, and used only if its SHA-512 is the one below.

The build calls this file before anything is installed: it imports nothing but Python's own library at the top.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import Final

VERSION: Final = "6.17.0"
INTEGRITY: Final = "sha512-2chIZwpLGenoUQOcnm9Pk4SLbA8ppNFq8jlpXiq9vcYm3Y1wJ3fc82FL0GLwBaPYJCLzPv/mC46KEupVov75rQ=="
"""What npm's records say of that version, in npm's writing: the base64 of the SHA-512 of its archive."""

FILES: Final = {
    "maplibre-gl.mjs": "package/dist/maplibre-gl.mjs",
    "maplibre-gl-worker.mjs": "package/dist/maplibre-gl-worker.mjs",
    "maplibre-gl.css": "package/dist/maplibre-gl.css",
    "LICENSE.txt": "package/LICENSE.txt",
}
"""What the page needs, and the licence that it comes with, by their places in the archive."""

FOLDER: Final = Path(__file__).parent / "page" / "maplibre"
RECORD: Final = "INTEGRITY"
"""File that says which archive the others are from; written with them, it is there only when they all are."""

COMMAND: Final = "python -m canopy.view.maplibre"
TIMEOUT_S: Final = 60


class DownloadError(Exception):
    """MapLibre GL could not be fetched; one line that says from where and why."""


def in_place(folder: Path = FOLDER) -> bool:
    """Whether the files of exactly this version are there."""
    record = folder / RECORD
    return record.is_file() and record.read_text() == INTEGRITY and all((folder / name).is_file() for name in FILES)


def archive_url() -> str:
    """Where the archive is: in the registry that npm is told to use, by its variable or by its settings.

    Raises:
        DownloadError: Nothing here says which registry that is.
    """
    told = {key.lower(): value for key, value in os.environ.items()}.get("npm_config_registry")
    return f"{(told or _npms_own()).rstrip('/')}/maplibre-gl/-/maplibre-gl-{VERSION}.tgz"


def _npms_own() -> str:
    """The registry that npm knows, a mirror of the house perhaps."""
    npm = shutil.which("npm")
    if npm is None:
        raise DownloadError(
            "no npm is here to say where npm packages are; install npm, or set npm_config_registry to the registry's address"
        )
    command = [npm, "config", "get", "registry"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)  # noqa: S603
    except (subprocess.SubprocessError, OSError) as error:
        raise DownloadError(f"npm does not say which registry it uses ({error}); set npm_config_registry") from error
    return told.stdout.strip()


def fetch(folder: Path = FOLDER, *, url: str | None = None) -> bool:
    """Put the files into a folder unless they are there; the folder appears whole or not at all.

    Args:
        folder: Where to; what an earlier version left there is replaced.
        url: Of the archive, where it is not `archive_url()`.

    Returns:
        Whether anything had to be fetched.

    Raises:
        DownloadError: The archive cannot be had, is not the one that was meant, or cannot be written.
    """
    if in_place(folder):
        return False
    url = archive_url() if url is None else url
    if not url.startswith(("https://", "http://", "file://")):
        raise DownloadError(f"MapLibre GL is at no address {url}; npm_config_registry must begin with https://")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:  # noqa: S310 - the scheme is checked above
            archive = answer.read()
    except (OSError, ValueError) as error:
        raise DownloadError(f"MapLibre GL {VERSION} cannot be had from {url}: {error}") from error
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if found != INTEGRITY:
        raise DownloadError(f"{url} is not MapLibre GL {VERSION}: its digest is {found}, not {INTEGRITY}; nothing was kept")
    try:
        _unpack(archive, folder)
    except OSError as error:
        raise DownloadError(f"MapLibre GL cannot be put into {folder}: {error}") from error
    return True


def _unpack(archive: bytes, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".maplibre-", dir=folder.parent) as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            for name, member in FILES.items():
                source = tar.extractfile(member)
                assert source is not None, f"{member} of the pinned archive is a file"
                (whole / name).write_bytes(source.read())
        (whole / RECORD).write_text(INTEGRITY)
        shutil.rmtree(folder, ignore_errors=True)
        whole.replace(folder)


def main() -> int:
    """The command: fetch it and say in one line what was done, or why it could not be."""
    try:
        fetched = fetch()
    except DownloadError as error:
        sys.stderr.write(f"{error}; all but canopy view works without it, try again with {COMMAND}\n")
        return 1
    if fetched:
        sys.stdout.write(f"MapLibre GL {VERSION} is in {FOLDER}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
