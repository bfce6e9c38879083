"""MapLibre GL is put in place whole, once, and only if it is the one that was meant."""

import base64
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from canopy.view import maplibre
from canopy.view.maplibre import FILES, RECORD, DownloadError, archive_url, fetch, in_place

ROOT = Path(__file__).resolve().parent.parent.parent


def write_archive(path: Path) -> str:
    """An archive with the files that are wanted and another; its digest as npm writes it."""
    with tarfile.open(path, "w:gz") as tar:
        for member in (*FILES.values(), "package/dist/maplibre-gl-dev.mjs"):
            content = f"content of {member}".encode()
            entry = tarfile.TarInfo(member)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


@pytest.fixture
def archive(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(maplibre, "INTEGRITY", write_archive(tmp_path / "a.tgz"))
    return (tmp_path / "a.tgz").as_uri()


def test_files_of_the_archive_are_put_in_place_once(archive, tmp_path):
    folder = tmp_path / "page" / "maplibre"
    assert not in_place(folder)
    assert fetch(folder, url=archive)
    assert in_place(folder)
    assert {path.name for path in folder.iterdir()} == {*FILES, RECORD}
    assert (folder / "LICENSE.txt").read_text() == "content of package/LICENSE.txt"
    assert not fetch(folder, url="file:///nowhere")
    # A file that somebody took away, or another version: all of them anew, and nothing else stays.
    (folder / "maplibre-gl.css").unlink()
    (folder / "old.js").touch()
    assert fetch(folder, url=archive)
    assert {path.name for path in folder.iterdir()} == {*FILES, RECORD}
    assert [path.name for path in folder.parent.iterdir()] == ["maplibre"]


def test_another_archive_is_refused_and_leaves_nothing(archive, tmp_path, monkeypatch):
    folder = tmp_path / "page" / "maplibre"
    monkeypatch.setattr(maplibre, "INTEGRITY", "sha512-AAAA")
    with pytest.raises(
        DownloadError, match=r"is not MapLibre GL .*: its digest is sha512-.*, not sha512-AAAA; nothing was kept"
    ):
        fetch(folder, url=archive)
    assert not folder.exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.tgz", "file:///nowhere/a.tgz", "ftp://example.org/a.tgz", "a.tgz"])
def test_no_archive_is_one_line(url, tmp_path):
    with pytest.raises(DownloadError) as caught:
        fetch(tmp_path / "maplibre", url=url)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "maplibre").exists()


def untold(monkeypatch, path: Path) -> None:
    """No variable names a registry, and programs are looked for in one folder."""
    for name in list(os.environ):
        if name.lower() == "npm_config_registry":
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(path))


def test_the_registry_is_the_one_that_a_variable_names_or_npm_knows(monkeypatch, tmp_path):
    untold(monkeypatch, tmp_path)
    npm = tmp_path / "npm"
    npm.write_text('#!/bin/sh\n[ "$*" = "config get registry" ] && echo https://house.example/npm/\n')
    npm.chmod(0o755)
    archive = f"maplibre-gl/-/maplibre-gl-{maplibre.VERSION}.tgz"
    assert archive_url() == f"https://house.example/npm/{archive}"
    monkeypatch.setenv("npm_config_registry", "https://mirror.example/npm/")
    assert archive_url() == f"https://mirror.example/npm/{archive}"


def test_where_nothing_names_a_registry_it_is_said(monkeypatch, tmp_path):
    untold(monkeypatch, tmp_path)
    with pytest.raises(DownloadError, match="install npm, or set npm_config_registry"):
        fetch(tmp_path / "maplibre")
    (tmp_path / "npm").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "npm").chmod(0o755)
    with pytest.raises(DownloadError, match=r"npm does not say .*; set npm_config_registry"):
        archive_url()


def copy_package(to: Path) -> Path:
    """What a build needs, without MapLibre GL."""
    ignored = shutil.ignore_patterns("maplibre", "__pycache__")
    shutil.copytree(ROOT / "canopy", to / "canopy", ignore=ignored)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, to / name)
    return to


@pytest.mark.slow
def test_a_wheel_holds_it_and_is_built_without_it_too(tmp_path):
    """Built as pip builds it, once with a registry that has it and once without any."""
    pytest.importorskip("hatchling")
    source, build = copy_package(tmp_path / "source"), [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    registry = tmp_path / "registry"
    archive = registry / "maplibre-gl" / "-" / f"maplibre-gl-{maplibre.VERSION}.tgz"
    archive.parent.mkdir(parents=True)
    digest = write_archive(archive)
    module = source / "canopy" / "view" / "maplibre.py"
    module.write_text(module.read_text().replace(maplibre.INTEGRITY, digest))

    def names(registry: str) -> tuple[set[str], str]:
        environment = os.environ | {"npm_config_registry": registry}
        done = subprocess.run(build, cwd=source, env=environment, capture_output=True, text=True, check=True)
        (wheel,) = (source / "dist").glob("*.whl")
        with zipfile.ZipFile(wheel) as file:
            return set(file.namelist()), done.stdout + done.stderr

    without, said = names("http://127.0.0.1:9")
    assert "canopy/view/page/index.html" in without
    assert not any("maplibre-gl" in name for name in without)
    assert f"canopy view will not work until {maplibre.COMMAND} has run" in said
    with_it, _ = names(registry.as_uri())
    assert with_it - without == {f"canopy/view/page/maplibre/{name}" for name in (*FILES, RECORD)}
