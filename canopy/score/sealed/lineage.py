"""What a submission was made of, held against what is sealed: ground, pictures, heights, names, and the base model.

The declaration is checked first for what it leaves out: of a model, whatever its contract says it was trained on has to be
declared. Then each declared tile set is audited against the sealed chips as any two sets are (`canopy.tiler.audit`), its
pictures and heights by their fingerprints (`canopy.tiler.fingerprint`), so that turned, rescaled and renamed copies are
found wherever they claim to lie, and its labels by what they derive from.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import shapely

from canopy.errors import CanopyError, SealError
from canopy.model.package import WEIGHTS, Contract, file_sha256
from canopy.score.sealed.key import Key
from canopy.score.sealed.kinship import LEAST_SHARE, kin_share
from canopy.score.sealed.submission import Check, Reason, Submission, TileSetDeclared, codes_of, index_of, part_of
from canopy.score.sealed.task import Task
from canopy.tiler.audit import audit_pair
from canopy.tiler.fingerprint import near_duplicates

_CHECK: Final[dict[str, Check]] = {
    "overlap": "ground",
    "content": "content",
    "lineage": "labels",
    "acquisition": "acquisition",
}

_SAME_DEG: Final = 1e-6
"""Boxes of contracts and declarations that differ by less, a decimetre, are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sealed:
    """What a lineage is held against."""

    task: Task
    key: Key
    room: Path
    """A folder for tables that are audited."""
    table: Path
    """The sealed chips as such a table."""
    names: frozenset[str]
    """Names that a product made from what is sealed would have to tell."""


def audit_lineage(folder: Path, submission: Submission, contract: Contract | None, task: Task, key: Key) -> list[Reason]:
    """Everything that speaks against a submission's lineage; empty where nothing does.

    Args:
        folder: The submission.
        submission: Its declaration.
        contract: Of the submitted model; None for maps and predictions, whose makers are believed.
        task: The task.
        key: Its key.
    """
    reasons = [*_left_out(submission, contract, key), *_base(folder, submission, task, key)]
    with tempfile.TemporaryDirectory(prefix="canopy-audit-") as name:
        room = Path(name)
        sealed = _Sealed(task=task, key=key, room=room, table=room / "sealed.parquet", names=_sealed_names(task, key))
        _sealed_table(key).to_parquet(sealed.table)
        reasons += _ground(submission, contract, sealed)
        for declared in submission.tile_set:
            try:
                reasons += _tile_set(folder, declared, sealed)
            except CanopyError as error:
                reasons.append(Reason(check="declaration", said=str(error)))
        reasons += _labels(submission, sealed)
    return reasons


# --- what is left out ----------------------------------------------------------------------------------------------------


def _left_out(submission: Submission, contract: Contract | None, key: Key) -> Iterator[Reason]:
    def undeclared(said: str) -> Reason:
        return Reason(check="declaration", said=said)

    learned = bool(submission.tile_set or submission.footprints_deg or submission.label or submission.sites)
    if submission.untrained and (submission.tile_set or submission.label):
        yield undeclared("it is declared untrained, and with what it was trained on")
    if not submission.untrained:
        if not learned or not (submission.tile_set or submission.footprints_deg):
            yield undeclared("no ground is declared that it was trained on, neither tile sets nor footprints")
        if not submission.label:
            yield undeclared("no label product is declared that its heights were learned from")
    for label in submission.label:
        if not (label.sites or label.derived_from):
            yield undeclared(f"label product {label.product!r} is declared without sites and without what it derives from")
    if contract is None:
        return
    before, trained = key.record.base_training, contract.training
    told = {(each.name, each.index_sha256) for each in submission.tile_set}
    for name, digest in trained.tile_sets.items():
        if (name, digest) not in told and before.tile_sets.get(name) != digest:
            yield undeclared(f"its contract names tile set {name} ({digest[:12]}…), which is not declared")
    sites = set(submission.sites) | set(before.sites)
    if missing := [site for site in trained.sites if site not in sites]:
        yield undeclared(f"its contract names site {missing[0]}, which is not declared")
    declared = shapely.union_all([shapely.box(*box) for box in (*submission.footprints_deg, *before.footprints_deg)])
    for box in trained.footprints_deg:
        if not declared.buffer(_SAME_DEG).covers(shapely.box(*box)):
            yield undeclared(f"its contract has footprint {box}, which is not declared")


def _base(folder: Path, submission: Submission, task: Task, key: Key) -> Iterator[Reason]:
    base, declared = task.base, submission.base
    says_base = declared.weights_sha256 == base.weights_sha256
    if task.rules.starts_from == "base" and not says_base:
        yield Reason(
            check="base",
            said=f"it is declared to start from {declared.name} ({declared.weights_sha256[:12] or 'no weights'}), "
            f"the task from {base.name} ({base.weights_sha256[:12]}…)",
        )
    if not says_base and declared.name != "none" and not declared.weights_sha256:
        yield Reason(check="declaration", said=f"base model {declared.name} is declared without the digest of its weights")
    model = part_of(folder, submission.path) if submission.kind == "model" else None
    if model is None or not (model / WEIGHTS).is_file() or (model / WEIGHTS).is_symlink():
        return
    if file_sha256(model / WEIGHTS) == base.weights_sha256:
        share = 1.0
    else:
        try:
            share = kin_share(key.sketch(), model / WEIGHTS, bytes.fromhex(key.record.secret))
        except SealError as error:
            yield Reason(check="files", said=str(error))
            return
    if says_base and share < LEAST_SHARE:
        yield Reason(
            check="base",
            said=f"{share:.0%} of the tensors of {base.name} have descendants in its weights, at least {LEAST_SHARE:.0%} "
            f"are expected: it starts from another model than declared",
        )
    if not says_base and share >= LEAST_SHARE:
        yield Reason(
            check="base", said=f"its weights descend from {base.name} ({share:.0%} of the tensors), which is not declared"
        )


# --- ground and content --------------------------------------------------------------------------------------------------


def _ground(submission: Submission, contract: Contract | None, sealed: _Sealed) -> Iterator[Reason]:
    """Boxes that it was trained in, its base model's apart, and sites."""
    import geopandas as gpd

    before = set(sealed.key.record.base_training.footprints_deg)
    own = () if contract is None else contract.training.footprints_deg
    boxes = [box for box in dict.fromkeys((*submission.footprints_deg, *own)) if box not in before]
    if boxes:
        told = sealed.room / "boxes.parquet"
        gpd.GeoDataFrame(geometry=[shapely.box(*box) for box in boxes], crs="EPSG:4326").to_parquet(told)
        yield from _audited("declared footprints", told, sealed)
    if sealed.task.rules.by_site:
        told_sites = {site.casefold() for site in submission.sites}
        if shared := sorted({chip.site for chip in sealed.key.record.chips if chip.site.casefold() in told_sites}):
            yield Reason(check="acquisition", said=f"it was trained at {', '.join(shared)}, which is sealed")


def _tile_set(folder: Path, declared: TileSetDeclared, sealed: _Sealed) -> Iterator[Reason]:
    place = part_of(folder, declared.path)
    if place is None:
        raise SealError(f"tile set {declared.name} is declared at {declared.path}, which is not in the submission")
    index = index_of(place, declared)
    images, heights = codes_of(place, [str(chip) for chip in index["id"]])
    # Every chip counts, also those that no split holds: nobody but who trained knows which were used.
    told = sealed.room / "declared.parquet"
    index.drop(columns="split").to_parquet(told)
    yield from _audited(f"tile set {declared.name}", told, sealed)
    chips = sealed.key.record.chips
    for what, codes, part in (("images", images, "image_codes"), ("heights", heights, "height_codes")):
        names = sorted(codes)
        known = [sealed.key.array(f"{part}/{chip.name}") for chip in chips]
        found = near_duplicates([codes[name] for name in names], known)
        if len(found):
            first = f"{names[found.a[0]]} shows {chips[found.b[0]].name}, {found.votes[0]} places agree"
            count = len(set(found.b.tolist()))
            said = f"tile set {declared.name} holds the {what} of {count} of the {len(chips)} sealed chips: {first}"
            yield Reason(check="content" if what == "images" else "labels", said=said)
    parents = {part for value in index["derived_from"] for part in str(value).split(";")}
    yield from _named(f"tile set {declared.name}", parents, sealed)


def _audited(name: str, told: Path, sealed: _Sealed) -> Iterator[Reason]:
    rules = sealed.task.rules
    report = audit_pair(told, sealed.table, buffer_m=rules.buffer_m, by_site=rules.by_site)
    for finding in report.findings:
        if finding.severity == "leak":
            said = finding.said.replace("test chips", "sealed chips").replace("train", "declared")
            yield Reason(check=_CHECK[finding.kind], said=f"{name}: {said}")


# --- names ---------------------------------------------------------------------------------------------------------------


def _labels(submission: Submission, sealed: _Sealed) -> Iterator[Reason]:
    flown = {(chip.lidar_source.casefold(), chip.site.casefold()) for chip in sealed.key.record.chips}
    for label in submission.label:
        yield from _named(f"label product {label.product!r}", (label.product, *label.derived_from), sealed)
        both = [site for site in label.sites if (label.source.casefold(), site.casefold()) in flown]
        if sealed.task.rules.by_site and both:
            said = f"label product {label.product!r} is made from {label.source} at {both[0]}, which is sealed"
            yield Reason(check="labels", said=said)


def _sealed_names(task: Task, key: Key) -> frozenset[str]:
    """Chips, items, digests and acquisitions."""
    names = {name for chip in key.record.chips for name in (chip.id, chip.item, chip.sha256)}
    return frozenset(_plain(name) for name in (*names, *task.acquisitions)) - {""}


def _named(what: str, names: Iterable[str], sealed: _Sealed) -> Iterator[Reason]:
    if hits := sorted({name.strip() for name in names if _plain(name) in sealed.names}):
        yield Reason(check="labels", said=f"{what} derives from {', '.join(hits[:3])}, which is sealed")


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())


def _sealed_table(key: Key) -> Any:
    """The sealed chips as a table that can be audited; under their public names, which reports may repeat."""
    import geopandas as gpd

    chips = key.record.chips
    columns = ("site", "item", "image_source", "lidar_source", "image_date", "lidar_date", "derived_from", "sha256")
    table = {"id": [chip.name for chip in chips]} | {name: [getattr(chip, name) for chip in chips] for name in columns}
    return gpd.GeoDataFrame(table, geometry=shapely.from_wkb([chip.footprint_wkb for chip in chips]), crs="EPSG:4326")
