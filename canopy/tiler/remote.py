"""Files of a source from where they are: signed, patiently, checked, with one line that says what went wrong.

Pixels go through odc-stac and GDAL, whole files through `stage`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from canopy.errors import ImageryError, OutputError
from canopy.grid import Grid
from canopy.raster import GDAL_ERRORS, has_mask, read_mask
from canopy.tiler.manifest import AssetRecord, ItemRecord, Manifest
from canopy.tiler.patience import PATIENCE, Patience
from canopy.tiler.sources import PlanetaryComputerSigning, RequesterPays, StacSource

if TYPE_CHECKING:
    import requests

_EXTENSIONS: Final = (
    "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
)

# odc-stac repeats on the log what it raises; the exception is what we report.
logging.getLogger("odc.loader._rio").setLevel(logging.CRITICAL)

T = TypeVar("T")

AssetBands = tuple[str, tuple[int, ...]]
"""An asset and 1-based bands of its file."""


# --- what services answer ------------------------------------------------------------------------------------------


def reason_of(error: BaseException) -> str:
    """The last part of an error's text, in one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    # requests puts the real reason last, behind pool and address.
    return text.rsplit("Caused by ", 1)[-1].strip("() ")[:160]


def remedy_for(status: int | None) -> str:
    """What to do about an HTTP status, or about no answer at all."""
    match status:
        case None:
            return "check the network and the address, and run again"
        case 401 | 403:
            return "access is refused: check the source's signing, or your account with the service"
        case 404 | 410:
            return "the address is wrong or gone: correct the source, or leave the item out (exclude)"
        case 429:
            return "the service limits how much one may ask: wait, and run again"
        case status if status >= 500:
            return "the service has a fault: run again later"
    return "check the source's description"


def stac_io(patience: Patience) -> Any:
    """How pystac and pystac-client ask: with a time limit, and again after failures that may pass."""
    import pystac
    from pystac_client.stac_api_io import StacApiIO
    from urllib3 import Retry

    class PatientIO(StacApiIO):
        def stac_object_from_dict(self, d: dict[str, Any], *args: Any, **kwargs: Any) -> pystac.STACObject:
            # The client's own reading takes every collection for one of an API; those of static catalogues are files.
            return pystac.StacIO.stac_object_from_dict(self, d, *args, **kwargs)

        def update(self, *args: Any, **kwargs: Any) -> None:
            # A client that is opened without a time limit of its own would take this one away.
            super().update(*args, **kwargs | {"timeout": patience.silence_s})

    retry = Retry(
        total=patience.attempts - 1, backoff_factor=patience.first_pause_s, status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods=None, raise_on_status=False, respect_retry_after_header=True,
    )  # fmt: skip
    return PatientIO(timeout=patience.silence_s, max_retries=retry)


def in_utc(when: datetime) -> datetime:
    """A moment in UTC; one without a zone is meant so."""
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file says of itself."""

    grid: Grid
    count: int
    dtype: str
    masked: bool
    """Whether it has a mask of its own."""


class Reader:
    """Reads files of a source through GDAL: signs their addresses, is patient, and says in one line what went wrong."""

    def __init__(self, source: StacSource, patience: Patience) -> None:
        self._source = source
        self._patience = patience
        self._token: tuple[str, datetime] | None = None

    # --- signatures ---

    def sign(self, href: str) -> str:
        """`href` with a signature that is still valid, where the source wants one and the host may see it."""
        signing = self._source.signing
        host = urlsplit(href).hostname or ""
        if not isinstance(signing, PlanetaryComputerSigning) or not any(host.endswith(end) for end in signing.hosts):
            return href
        # A signature near its end could expire between two requests for one file.
        if self._token is None or self._token[1] - datetime.now(UTC) < timedelta(seconds=2 * self._patience.silence_s):
            self._token = self._new_token(signing)
        return f"{href}{'&' if '?' in href else '?'}{self._token[0]}"

    def renew(self) -> None:
        """The next address is signed anew."""
        self._token = None

    def _new_token(self, signing: PlanetaryComputerSigning) -> tuple[str, datetime]:
        import requests

        status = None
        try:
            answer = self._session().get(signing.token_url, timeout=self._patience.silence_s)
            status = answer.status_code
            answer.raise_for_status()
            table = answer.json()
            return str(table["token"]), in_utc(datetime.fromisoformat(table["msft:expiry"]))
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            what = f"answers {status}" if status and status >= 400 else f"gives none ({reason_of(error)})"
            raise ImageryError(
                f"{self._source.name} needs signatures and {signing.token_url} {what}; {remedy_for(status)}"
            ) from error

    def _session(self) -> Any:
        return stac_io(self._patience).session

    # --- reading ---

    def header(self, href: str, what: str) -> Header:
        """Grid, number of bands and data type of a file."""
        return self._patiently([href], what, lambda: _header(self.sign(href)))

    def load(
        self, item: ItemRecord, assets: Sequence[tuple[str, tuple[int, ...]]], headers: dict[str, Header], grid: Grid
    ) -> Any:
        """Bands of assets that share one grid, on a part of that grid, as (band, row, col).

        Args:
            item: The scene.
            assets: What to read, in the order wanted.
            headers: Of each asset's file.
            grid: The part to read, inside the assets' grid.
        """
        import odc.stac
        from odc.geo.geobox import GeoBox

        names = [f"{name}.{index}" if headers[name].count > 1 else name for name, indices in assets for index in indices]
        geobox = GeoBox(grid.shape, grid.transform, item.assets[assets[0][0]].crs)
        described = _odc_item(item, [name for name, _ in assets], headers)

        def read() -> NDArray[Any]:
            loaded = odc.stac.load(
                [described], bands=names, geobox=geobox, groupby="id", resampling="nearest", chunks=None,
                # Files side by side; bands of one file after one another, since they often share its blocks.
                pool=min(4, len(assets)) if len(assets) > 1 else None, fail_on_error=True, patch_url=self.sign,
            )  # fmt: skip
            values = np.stack([loaded[name].values[0] for name in names])
            assert values.dtype == headers[assets[0][0]].dtype, f"odc-stac turned {headers} into {values.dtype}"
            return values

        return self._patiently([item.assets[name].href for name, _ in assets], f"item {item.id}", read)

    def mask(self, href: str, what: str, first: tuple[int, int], shape: tuple[int, int]) -> NDArray[np.bool_]:
        """(row, col) what a file's own mask leaves valid in a window; odc-stac does not read it."""
        return self._patiently([href], what, lambda: read_mask(self.sign(href), *first, shape))

    def _patiently(self, hrefs: Sequence[str], what: str, read: Callable[[], T]) -> T:
        """`read`, again after failures that may pass. GDAL itself repeats single requests; this repeats the whole.

        Why both: GDAL knows nothing of signatures that have expired, nor of a body that was cut short and shows only when it
        is decoded.
        """
        renewed = False
        failure: BaseException | None = None
        for attempt in range(self._patience.attempts):
            if attempt:
                time.sleep(self._patience.first_pause_s * 2 ** (attempt - 1))
            try:
                with _gdal(self._options()):
                    return read()
            except GDAL_ERRORS as error:
                failure = error
            self._forget(hrefs)
            href, status = self._probe(hrefs)
            if status in {401, 403} and self._token is not None and not renewed:
                renewed = True
                self.renew()
                continue
            # Anything else than success was already repeated by GDAL, or will not change by being repeated.
            if status is None or not 200 <= status < 300:
                answers = f"answers {status}" if status else f"does not answer within {self._patience.silence_s:g} s"
                raise ImageryError(
                    f"{self._source.name}: {_service(href)} {answers} to {what} ({href}); {remedy_for(status)}"
                ) from failure
        reason = reason_of(_cause(failure))
        if urlsplit(hrefs[0]).scheme == "s3":
            raise ImageryError(
                f"{self._source.name}: {what} ({hrefs[0]}) cannot be read ({reason}); set AWS_ACCESS_KEY_ID, "
                f"AWS_SECRET_ACCESS_KEY and AWS_REGION to an account that may read the bucket"
            ) from failure
        raise ImageryError(
            f"{self._source.name}: {what} ({hrefs[0]}) cannot be decoded in {self._patience.attempts} attempts ({reason}): "
            f"the file is damaged or its body is cut short; leave the item out (exclude)"
        ) from failure

    def _options(self) -> dict[str, str]:
        options = {
            "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
            "GDAL_HTTP_MAX_RETRY": str(self._patience.attempts - 1),
            "GDAL_HTTP_RETRY_DELAY": str(self._patience.first_pause_s),
            "GDAL_HTTP_CONNECTTIMEOUT": str(math.ceil(self._patience.connect_s)),
            # Silence ends a request, not its length: a slow line may take its time for a large range.
            "GDAL_HTTP_LOW_SPEED_TIME": str(math.ceil(self._patience.silence_s)),
            "GDAL_HTTP_LOW_SPEED_LIMIT": "1",
            # What GDAL fetches in parallel passes its cache by, and each band of a file would fetch the same blocks again.
            "GDAL_HTTP_MULTIRANGE": "SERIAL",
            "CPL_VSIL_CURL_CACHE_SIZE": str(128 << 20),
            # A truncated JPEG block is only a warning to libjpeg: its missing rows would arrive grey.
            "GDAL_ERROR_ON_LIBJPEG_WARNING": "TRUE",
        }
        if isinstance(self._source.signing, RequesterPays):
            options["AWS_REQUEST_PAYER"] = "requester"
        return options

    def _forget(self, hrefs: Iterable[str]) -> None:
        """GDAL remembers that an address failed; opened once with caching off, it forgets when it closes."""
        options = self._options() | {"CPL_VSIL_CURL_NON_CACHED": "/vsicurl/http", "GDAL_HTTP_MAX_RETRY": "0"}
        for href in hrefs:
            with suppress(*GDAL_ERRORS), _gdal(options):
                _header(self.sign(href))

    def _probe(self, hrefs: Iterable[str]) -> tuple[str, int | None]:
        """The first of the addresses that is not answered with success, and how it is; (the first one, 200) if all are."""
        import requests

        last = ""
        for href in hrefs:
            last = last or href
            if urlsplit(href).scheme not in {"http", "https"}:
                if not Path(href).exists() and "://" not in href:
                    return href, 404
                continue
            try:
                with requests.get(
                    self.sign(href), headers={"Range": "bytes=0-0"}, timeout=self._patience.silence_s, stream=True
                ) as answer:
                    if not answer.ok:
                        return href, answer.status_code
            except requests.RequestException:
                return href, None
        return last, 200


@contextmanager
def _gdal(options: dict[str, str]) -> Iterator[None]:
    import rasterio

    with rasterio.Env(**options):
        yield


def _cause(error: BaseException | None) -> BaseException:
    """The first of a chain of errors: rasterio's own only says that there was another."""
    assert error is not None, "nothing failed"
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _service(href: str) -> str:
    return urlsplit(href).netloc or "the file system"


def _header(address: str) -> Header:
    import rioxarray

    opened: Any = rioxarray.open_rasterio(address, cache=False, lock=False)
    try:
        crs = opened.rio.crs
        if crs is None:
            raise ImageryError(f"{address.partition('?')[0]} has no CRS; leave the item out (exclude)")
        grid = Grid(
            crs=CRS.from_wkt(crs.to_wkt()), transform=opened.rio.transform(), shape=(opened.rio.height, opened.rio.width)
        )
        return Header(
            grid=grid, count=int(opened.sizes["band"]), dtype=str(opened.dtype), masked=has_mask(address)
        )  # fmt: skip
    finally:
        opened.close()


def _odc_item(item: ItemRecord, names: Iterable[str], headers: dict[str, Header]) -> Any:
    """An item with nothing but what odc-stac needs of it, so that what a catalogue says elsewhere changes no pixel."""
    import pystac

    made = pystac.Item(
        id=item.id, geometry={"type": "Point", "coordinates": [0.0, 0.0]}, bbox=[0.0, 0.0, 0.0, 0.0],
        datetime=datetime.fromisoformat(item.datetime), properties={}, stac_extensions=list(_EXTENSIONS),
    )  # fmt: skip
    for name in names:
        asset = item.assets[name]
        reference = {"proj:code": asset.crs} if not asset.crs.endswith("]") else {"proj:wkt2": asset.crs}
        extra = {
            **reference,
            "proj:shape": list(asset.shape),
            "proj:transform": list(asset.transform),
            "raster:bands": [{"data_type": headers[name].dtype}] * headers[name].count,
        }
        made.add_asset(name, pystac.Asset(asset.href, media_type="image/tiff", roles=["data"], extra_fields=extra))
    return made


# --- staging --------------------------------------------------------------------------------------------------------

_HASHES: Final = {"11": "sha1", "12": "sha256", "13": "sha512", "d501": "md5"}
"""Multihash codes -> hashlib's names."""


def stage(
    manifest: Manifest,
    folder: Path | str,
    *,
    patience: Patience = PATIENCE,
) -> Manifest:
    """Fetch all files of a manifest whole, check them, and return the manifest of the copies.

    For servers without byte ranges, for machines without network, and to hold files to their checksums, which ranges cannot.
    Files that are there already, with the right size and checksum, are not fetched again.

    Raises:
        ImageryError: a service refuses, a body is cut short, or a checksum does not agree.
        OutputError: the folder cannot be written.
    """
    folder = Path(folder)
    reader = Reader(manifest.source, patience)
    items = []
    for item in manifest.items:
        assets = {}
        for name, asset in item.assets.items():
            suffix = Path(urlsplit(asset.href).path).suffix or ".tif"
            path = folder / item.collection / item.id / f"{name}{suffix}"
            _fetch(reader, asset, path, f"item {item.id}, asset {name}", patience)
            assets[name] = asset.model_copy(update={"href": str(path.resolve())})
        items.append(item.model_copy(update={"assets": assets}))
    return Manifest(source=manifest.source, search=manifest.search, items=tuple(items))


def _fetch(reader: Reader, asset: AssetRecord, path: Path, what: str, patience: Patience) -> None:
    import requests

    if path.is_file() and (asset.checksum or asset.size_bytes is not None) and _problem(asset, path) is None:
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    renewed = False
    reason = "nothing was tried"
    status: int | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(patience.attempts):
            if attempt:
                time.sleep(patience.first_pause_s * 2 ** (attempt - 1))
            try:
                with _open_href(reader, asset.href, patience) as blocks, part.open("wb") as file:
                    for block in blocks:
                        file.write(block)
            except requests.HTTPError as error:
                status = answer_status(error)
                reason = f"{_service(asset.href)} answers {status}"
                if status in {401, 403} and not renewed:
                    renewed = True
                    reader.renew()
                    continue
                if status < 500 and status != 429:
                    break
                continue
            except requests.RequestException as error:  # a body that was cut short among them
                status, reason = None, reason_of(error)
                continue
            problem = _problem(asset, part)
            if problem is not None:
                raise ImageryError(f"{what} ({asset.href}): {problem}; fetch it again, or leave the item out (exclude)")
            part.replace(path)
            return
        raise ImageryError(f"{what} ({asset.href}) cannot be fetched: {reason}; {remedy_for(status)}")
    except OSError as error:
        raise OutputError(f"cannot write {path} ({error.strerror}); free disk space or choose another folder") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def answer_status(error: requests.HTTPError) -> int:
    """The status of an answer that was an error."""
    assert error.response is not None, "an HTTP error without its answer"
    return error.response.status_code


@contextmanager
def _open_href(reader: Reader, href: str, patience: Patience) -> Iterator[Iterator[bytes]]:
    if urlsplit(href).scheme not in {"http", "https"}:
        with Path(href).open("rb") as file:
            yield iter(lambda: file.read(1 << 20), b"")
        return
    import requests

    with requests.get(reader.sign(href), stream=True, timeout=patience.silence_s) as answer:
        answer.raise_for_status()
        yield answer.iter_content(1 << 20)


def _problem(asset: AssetRecord, path: Path) -> str | None:
    """What is wrong with a fetched file, or None."""
    size = path.stat().st_size
    if asset.size_bytes is not None and size != asset.size_bytes:
        return f"it has {size} bytes, and the catalogue says {asset.size_bytes}"
    if asset.checksum is None:
        return None
    text = asset.checksum.lower()
    code = next((code for code in _HASHES if text.startswith(code)), None)
    if code is None:
        return f"its checksum {text[:12]}… is of no known kind ({', '.join(_HASHES.values())})"
    expected = text[len(code) + 2 :]  # two digits of length stand between the code and the digest
    with path.open("rb") as file:
        found = hashlib.file_digest(file, _HASHES[code]).hexdigest()
    return None if found == expected else f"its {_HASHES[code]} is {found[:12]}…, and the catalogue says {expected[:12]}…"
