"""Maps that are stopped and gone on with: killed at any moment, failed, begun with other inputs, held by another run."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from filelock import FileLock

import canopy.region.plan
import canopy.region.records
import canopy.region.run
import canopy.region.sheet
from canopy.errors import CanopyError, OutputError, RasterError, RegionError
from canopy.grid import Box
from canopy.mosaicker.publish import stage_sheet
from canopy.raster import read_raster, write_raster
from canopy.region import map_region, region_status, resume_region
from tests.region.conftest import BOX, COUNT, LATTICE, SHEET_PX, SHEETS, content

WORK = ".canopy-work"


def records(out, stage="*"):
    return sorted(out.glob(f"{WORK}/*/records/*.{stage}.json"))


def command(image, model, out, *words):
    return ("map", "--imagery", image, "--model", model, "--out", out, "--sheet-size", SHEET_PX, *words)


def wait_for(what, fork, seconds=120.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "nothing happened"
        assert fork.is_running, fork.stderr.read_text()
        time.sleep(0.002)


def ran(monkeypatch):
    """The sheets that are predicted from now on."""
    numbers = []
    real = canopy.region.sheet._predict
    monkeypatch.setattr(canopy.region.sheet, "_predict", lambda desk, number: numbers.append(number) or real(desk, number))
    return numbers


# --- killed ----------------------------------------------------------------------------------------------------------------


def test_a_killed_map_goes_on_and_ends_with_the_same_bytes(forks, image, tiny_model, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    fork = forks.start(*command(image, tiny_model, out))
    wait_for(lambda: len(records(out, "predict")) >= 2, fork)
    assert fork.kill() == -signal.SIGKILL
    assert [path.name for path in out.iterdir()] == [WORK]
    done = len(records(out, "predict"))
    status = region_status(out)
    assert (status.state, status.done, status.sheets, status.failed, status.changed) == ("unfinished", done, COUNT, (), None)
    numbers = ran(monkeypatch)
    seen = []
    resume_region(out, progress=lambda windows, total: seen.append((windows, total)))
    assert len(numbers) == COUNT - done, "what was done is done again"
    assert content(out) == whole
    assert not (out / WORK).exists()
    assert seen[0][0] > 0
    assert seen[-1][0] == seen[-1][1]
    assert region_status(out).state == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("one_file", [True, False])
def test_killed_at_twenty_random_moments(forks, image, tiny_model, whole, whole_sheets, tmp_path, one_file):
    """A map, and what goes on with it, killed over and over; started anew when it was finished in spite of that."""
    unbroken = whole if one_file else whole_sheets
    words = () if one_file else ("--max-file-size", SHEETS["max_file_px"])
    start = time.monotonic()
    assert forks.start(*command(image, tiny_model, tmp_path / "timed", *words)).wait() == 0
    takes_s = time.monotonic() - start
    assert content(tmp_path / "timed") == unbroken
    rng = random.Random(f"kills {one_file}")
    killed = finished = 0
    out = tmp_path / "0"
    while killed < 20:
        whole_now = (out / "run.json").exists()
        if region_left(out) or (whole_now and (out / WORK).exists()):
            fork = forks.start("map", "resume", out)
        else:  # not begun, or killed before there was a plan, or whole
            if whole_now:
                assert content(out) == unbroken
                finished += 1
                out = tmp_path / str(finished)
            fork = forks.start(*command(image, tiny_model, out, *words))
        time.sleep(rng.uniform(0, takes_s))
        code = fork.kill()
        killed += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), fork.stderr.read_text()
    if region_left(out):
        assert forks.start("map", "resume", out).wait() == 0
    elif not (out / "run.json").exists():  # killed before there was a plan
        assert forks.start(*command(image, tiny_model, out, *words)).wait() == 0
    assert content(out) == unbroken
    assert not (out / WORK).exists()


def region_left(out):
    return bool(list(out.glob(f"{WORK}/*/plan.json")))


def test_a_kill_between_two_results_is_made_good(image, tiny_model, whole_sheets, tmp_path, monkeypatch):
    """Of the files that take their names last, some have and some have not."""
    out, stop_at = tmp_path / "out", 3
    real, moved = canopy.region.records.Path.replace, []

    def replace(self, target):
        if self.parent.name == "result" and str(target).startswith(str(out)) and target.parent == out:
            if len(moved) == stop_at:
                raise KeyboardInterrupt
            moved.append(target.name)
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(canopy.region.records.Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            map_region(imagery=image, model=tiny_model, out=out, **SHEETS)
    assert sorted(path.name for path in out.iterdir()) == sorted([WORK, *moved])
    resume_region(out)
    assert content(out) == whole_sheets


def test_staged_files_that_are_lost_are_made_again(image, tiny_model, whole, tmp_path, monkeypatch):
    out = stopped(image, tiny_model, tmp_path, monkeypatch, after=4)
    names = [path.name.removesuffix(".predict.json") for path in records(out)]
    lost, short = (next(out.glob(f"{WORK}/*/staged/{name}_height.tif")) for name in names[:2])
    lost.unlink()
    short.write_bytes(short.read_bytes()[:-1])
    numbers = ran(monkeypatch)
    resume_region(out)
    assert len(numbers) == COUNT - 4 + 2
    assert content(out) == whole


# --- stopped, and other inputs -------------------------------------------------------------------------------------------


def stopped(image, model, folder, monkeypatch, *, after, **options):
    """A map that Ctrl-C stopped after so many sheets."""
    out = folder / "out"
    real = canopy.region.records.Work.finish

    def finish(self, record):
        if len(records(out)) >= after:
            raise KeyboardInterrupt
        return real(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(canopy.region.run, "crew_for", alone)
        patch.setattr(canopy.region.records.Work, "finish", finish)
        with pytest.raises(KeyboardInterrupt):
            map_region(imagery=image, model=model, out=out, **({"sheet_px": SHEET_PX} | options))
    assert len(records(out)) == after
    return out


def alone(plan, engine, sheets):
    """No cluster: what a test stops is stopped at once."""
    from contextlib import nullcontext

    return nullcontext(None)


def test_a_changed_model_is_refused(image, tiny_model, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    out = stopped(image, model, tmp_path, monkeypatch, after=3)
    text = (model / "model.toml").read_text()
    (model / "model.toml").write_text(text.replace("stride_px = 48", "stride_px = 32"))
    with pytest.raises(OutputError, match=r"model .*model changed since .*--overwrite"):
        resume_region(out)
    assert "changed" in region_status(out).changed
    with pytest.raises(OutputError, match=r"unfinished map which this is not: it has model tiny .*canopy map resume"):
        map_region(imagery=image, model=model, out=out, sheet_px=SHEET_PX)
    assert len(records(out)) == 3, "a refusal changes nothing"
    (model / "model.toml").write_text(text)
    resume_region(out)


def test_changed_imagery_is_refused(image, tiny_model, tmp_path, monkeypatch):
    photo = tmp_path / "photo.tif"
    shutil.copy2(image, photo)
    out = stopped(photo, tiny_model, tmp_path, monkeypatch, after=3)
    state = photo.stat()
    os.utime(photo, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    with pytest.raises(OutputError, match=r"photo\.tif changed since the map was planned; .*--overwrite"):
        resume_region(out)
    with pytest.raises(OutputError, match=r"it has a changed .*photo\.tif .*--overwrite"):
        map_region(imagery=photo, model=tiny_model, out=out, sheet_px=SHEET_PX)
    map_region(imagery=photo, model=tiny_model, out=out, sheet_px=SHEET_PX, overwrite=True)
    assert not (out / WORK).exists()


def test_a_sidecar_is_part_of_the_imagery(image, tiny_model, tmp_path, monkeypatch):
    photo = tmp_path / "photo.tif"
    shutil.copy2(image, photo)
    (tmp_path / "photo.tif.aux.xml").write_text("<PAMDataset></PAMDataset>")
    out = stopped(photo, tiny_model, tmp_path, monkeypatch, after=1)
    (tmp_path / "photo.tif.aux.xml").write_text("<PAMDataset> </PAMDataset>")
    with pytest.raises(OutputError, match=r"photo\.tif\.aux\.xml changed"):
        resume_region(out)


def test_imagery_that_changes_under_a_run_stops_it(image, tiny_model, tmp_path, monkeypatch):
    photo = tmp_path / "photo.tif"
    shutil.copy2(image, photo)
    real = canopy.region.records.Work.finish

    def finish(self, record):
        if len(records(tmp_path / "out")) == 2:
            write_raster(photo, np.zeros((3, *BOX.shape), np.uint8), grid=LATTICE.grid(BOX))
        return real(self, record)

    monkeypatch.setattr(canopy.region.records.Work, "finish", finish)
    with pytest.raises(RegionError, match=r"photo\.tif changed since the map was planned"):
        map_region(imagery=photo, model=tiny_model, out=tmp_path / "out", sheet_px=SHEET_PX)
    assert not (tmp_path / "out" / "height.tif").exists()


def test_a_map_is_not_begun_over_an_unfinished_one(image, tiny_model, whole, tmp_path, monkeypatch):
    out = stopped(image, tiny_model, tmp_path, monkeypatch, after=3)
    same = {"imagery": image, "model": tiny_model, "out": out, "sheet_px": SHEET_PX}
    with pytest.raises(OutputError, match=r"unfinished map of the same \(3 of 6 sheets\); .*canopy map resume .*out"):
        map_region(**same)
    for other, what in ((({"gsd_m": 0.8}), "other GSD"), ({"tta": "flips"}, "other test-time augmentation")):
        with pytest.raises(OutputError, match=f"it has {what}"):
            map_region(**same, **other)
    numbers = ran(monkeypatch)
    map_region(**same, overwrite=True)
    assert len(numbers) == COUNT
    assert content(out) == whole


def test_another_version_of_canopy_is_refused(image, tiny_model, tmp_path, monkeypatch):
    out = stopped(image, tiny_model, tmp_path, monkeypatch, after=1)
    monkeypatch.setattr(canopy.region.plan, "__version__", "99.0")
    with pytest.raises(OutputError, match=r"planned by canopy .* and this is canopy 99\.0"):
        resume_region(out)


def test_nothing_to_go_on_with(tmp_path, image, tiny_model):
    for call in (resume_region, region_status):
        with pytest.raises(OutputError, match=r"nowhere holds no map"):
            call(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())
    out = tmp_path / "out"
    result = map_region(imagery=image, model=tiny_model, out=out)
    before = result.height.stat().st_mtime_ns
    assert resume_region(out) == result, "a finished map is what going on with it gives"
    assert result.height.stat().st_mtime_ns == before


# --- one run at a time ---------------------------------------------------------------------------------------------------


def test_a_second_run_stops_and_a_killed_one_lets_go(forks, image, tiny_model, tmp_path):
    out = tmp_path / "out"
    fork = forks.start(*command(image, tiny_model, out))
    wait_for(lambda: records(out), fork)
    os.kill(fork.pid, signal.SIGSTOP)
    try:
        assert region_status(out).state == "running"
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
        for second in (
            lambda: resume_region(out),
            lambda: map_region(imagery=image, model=tiny_model, out=out, sheet_px=SHEET_PX, overwrite=True),
        ):
            with pytest.raises(OutputError, match="another run is writing to"):
                second()
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    finally:
        fork.kill()
    assert region_status(out).state == "unfinished"
    resume_region(out)


def test_the_lock_is_the_file_systems(tmp_path, image, tiny_model):
    """Negative control of the lock: without the holder nobody is refused."""
    (tmp_path / "out" / WORK).mkdir(parents=True)
    lock = FileLock(tmp_path / "out" / WORK / "lock")
    with lock, pytest.raises(OutputError, match="another run"):
        map_region(imagery=image, model=tiny_model, out=tmp_path / "out")
    map_region(imagery=image, model=tiny_model, out=tmp_path / "out")


# --- sheets that fail ------------------------------------------------------------------------------------------------------


def damaged(image, path):
    """A copy with a block that cannot be decoded in the middle."""
    pixels, grid = read_raster(image)
    import rasterio

    with rasterio.open(
        path, "w", driver="GTiff", width=grid.shape[1], height=grid.shape[0], count=3, dtype="uint8", crs=grid.crs.to_wkt(),
        transform=grid.transform, tiled=True, blockxsize=64, blockysize=64, compress="deflate",
    ) as dataset:  # fmt: skip
        dataset.write(pixels.data)
    with rasterio.open(path) as dataset:
        start = int(dataset.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
    data = path.read_bytes()
    path.write_bytes(data[:start] + b"\xff" * 64 + data[start + 64 :])
    return path


def test_a_sheet_that_cannot_be_read_is_named_and_the_others_kept(image, tiny_model, tmp_path, forks):
    photo, out = damaged(image, tmp_path / "photo.tif"), tmp_path / "out"
    fork = forks.start(*command(photo, tiny_model, out))
    assert fork.wait() == 1
    said = fork.stderr.read_text().strip().splitlines()[-1]
    status = region_status(out)
    assert 0 < len(status.failed) < COUNT
    assert status.done == COUNT - len(status.failed)
    assert said.startswith(f"canopy: {len(status.failed)} of {COUNT} sheets failed: ")
    assert all(failed.name in said and "cannot be decoded" in failed.message for failed in status.failed[:10])
    assert said.endswith(f"{status.done} are kept: canopy map resume {out} goes on from there")
    assert "Traceback" not in fork.stderr.read_text()
    assert [path.name for path in out.iterdir()] == [WORK]


def test_a_sheet_that_fails_once_is_tried_again(image, tiny_model, whole, tmp_path, monkeypatch):
    real, tried = canopy.region.sheet._predict, []

    def predict(desk, number):
        tried.append(number)
        if number == 4 and tried.count(4) == 1:
            raise RasterError("the server is away; wait")
        return real(desk, number)

    monkeypatch.setattr(canopy.region.sheet, "_predict", predict)
    map_region(imagery=image, model=tiny_model, out=tmp_path / "out", sheet_px=SHEET_PX)
    assert tried.count(4) == 2
    assert len(tried) == COUNT + 1
    assert content(tmp_path / "out") == whole


def test_a_bug_is_not_hidden(image, tiny_model, tmp_path, monkeypatch):
    """Negative control: only what a user can cause is put in one line."""
    real = canopy.region.sheet._predict
    monkeypatch.setattr(canopy.region.sheet, "_predict", lambda desk, number: real(desk, number) if number else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        map_region(imagery=image, model=tiny_model, out=tmp_path / "out", sheet_px=SHEET_PX)


def test_a_disk_that_fills_up_keeps_what_is_done(image, tiny_model, whole, tmp_path, small_disk, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("canopy.region.run.shutil.disk_usage", lambda path: usage._replace(free=10**12))
    with stage_sheet(tmp_path, LATTICE, Box(BOX.row0, BOX.col0, BOX.row1, BOX.col0 + SHEET_PX)) as (sheet, _):
        pass
    disk = small_disk(int(3.4 * sum(path.stat().st_size for path in (sheet.height, sheet.error))) + (100 << 10))
    with pytest.raises(
        RegionError, match=r"free disk space .*more were not begun; \d+ are kept: canopy map resume"
    ) as error:
        map_region(imagery=image, model=tiny_model, out=disk / "out", sheet_px=SHEET_PX)
    assert "\n" not in str(error.value)
    done = region_status(disk / "out").done
    assert 0 < done < COUNT
    assert not list((disk / "out").glob(f"{WORK}/*/attempts/*"))
    subprocess.run(["mount", "-o", f"remount,size={256 << 20}", str(disk)], check=True)
    numbers = ran(monkeypatch)
    resume_region(disk / "out")
    assert len(numbers) == COUNT - done
    assert content(disk / "out") == whole


def test_a_folder_that_is_read_only(image, tiny_model, tmp_path, small_disk, monkeypatch):
    disk = small_disk(256 << 20)
    out = stopped(image, tiny_model, disk, monkeypatch, after=2)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(OutputError, match=r"cannot create .*Read-only file system"):
        map_region(imagery=image, model=tiny_model, out=disk / "new")
    with pytest.raises(CanopyError, match="Read-only file system"):
        resume_region(out)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    resume_region(out)


def test_the_record_of_a_run_that_was_gone_on_with(image, tiny_model, tmp_path, monkeypatch):
    out = stopped(image, tiny_model, tmp_path, monkeypatch, after=4)
    run = json.loads(resume_region(out).run.read_text())
    assert run["plan"]["sheets_found_done"] == 4
    unbroken = json.loads(
        map_region(imagery=image, model=tiny_model, out=tmp_path / "other", sheet_px=SHEET_PX).run.read_text()
    )
    assert run["plan"]["identity"] == unbroken["plan"]["identity"]
    assert run["map"] == unbroken["map"]
