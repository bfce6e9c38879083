"""Where the server listens, and how it starts and ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import requests

from canopy.errors import ViewError
from canopy.view import maplibre, serve
from canopy.view.serve import Address, _listening, _url, checked_basemap


def taken():
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def test_the_first_free_port_is_taken(monkeypatch):
    with taken() as used:
        monkeypatch.setattr(serve, "FIRST_PORT", used.getsockname()[1])
        with _listening(Address()) as listener:
            assert listener.getsockname()[0] == "127.0.0.1"
            assert listener.proto == socket.IPPROTO_TCP, "without it every answer takes 40 ms longer"
            assert used.getsockname()[1] < listener.getsockname()[1] < used.getsockname()[1] + serve.PORTS


def test_a_taken_port_is_a_line():
    with taken() as used:
        port = used.getsockname()[1]
        with pytest.raises(ViewError, match=f"port {port} of 127.0.0.1 cannot be had .* give another --port"):
            _listening(Address(port=port))


@pytest.mark.parametrize("port", [0, -1, 65_536])
def test_a_port_that_is_none_is_a_line(port):
    with pytest.raises(ViewError, match=f"--port {port} is not one of 1 to 65535"):
        Address(port=port)


def test_an_unknown_host_is_a_line():
    with pytest.raises(ViewError, match=r"--host 'no\.such\.host\.invalid' is not known"):
        _listening(Address(host="no.such.host.invalid"))
    with pytest.raises(ViewError, match=r"192\.0\.2\.1"):  # for documents: no computer has it
        _listening(Address(host="192.0.2.1", port=8765))


def test_addresses_of_six_groups_have_brackets():
    assert _url("::1", 8765) == "http://[::1]:8765/"
    assert _url("127.0.0.1", 8765) == "http://127.0.0.1:8765/"


@pytest.mark.parametrize(
    "url",
    [
        "tiles/{z}/{x}/{y}.png",
        "ftp://a.org/{z}/{x}/{y}.png",
        "https://a.org/{z}/{x}.png",
        "https:///{z}/{x}/{y}.png",
        "https://{s}.a.org/{z}/{x}/{y}.png",
        "https://a.org; script-src *//{z}/{x}/{y}.png",
        "javascript:alert(1)//{z}/{x}/{y}",
    ],
)
def test_a_base_map_that_is_none_is_a_line(url):
    with pytest.raises(ViewError, match="--basemap"):
        checked_basemap(url)


def test_a_base_map_is_an_address_of_tiles():
    assert checked_basemap(None) is None
    assert checked_basemap("https://a.org/{z}/{x}/{y}.png") == "https://a.org/{z}/{x}/{y}.png"


def test_a_page_without_its_library_is_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr(serve.maplibre, "in_place", lambda: False)
    with pytest.raises(ViewError, match=r"lacks MapLibre GL .* put it in place once: python -m canopy\.view\.maplibre"):
        serve.serve(tmp_path, say=print, warn=print)


# --- as a program ----------------------------------------------------------------------------------------------------------


def start(*words):
    if not maplibre.in_place():
        pytest.skip(f"MapLibre GL is not in place: {maplibre.COMMAND}")
    command = [sys.executable, "-m", "canopy.cli", "view", *map(str, words), "--no-open"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def told_url(process):
    return re.match(r"(http://127\.0\.0\.1:\d+/)  \(Ctrl-C ends\)", process.stdout.readline()).group(1)


@pytest.mark.slow
def test_it_starts_answers_and_ends_with_ctrl_c(made):
    process = start(made.out)
    url = told_url(process)
    try:
        assert requests.get(f"{url}map.json", timeout=30).json()["name"] == "map"
        with requests.Session() as kept:  # a browser's connection that stays open does not hold it up
            assert kept.get(f"{url}tiles/height/12/0/0.png", timeout=30).status_code == 200
            asked = time.monotonic()
            process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=30)
        assert time.monotonic() - asked < 10
        assert (process.returncode, out, errors) == (0, "", "")
        with pytest.raises(requests.ConnectionError):
            requests.get(url, timeout=5)
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{nothing}"], "does not exist; give the output folder of canopy map"),
        (["{out}", "--port", "{port}"], "cannot be had"),
        (["{out}", "--reference", "{nothing}"], "does not exist"),
        (["{out}", "--basemap", "here"], "no address of tiles"),
    ],
)
def test_what_cannot_be_shown_is_a_line(made, tmp_path, words, said):
    with taken() as used:
        names = {"out": made.out, "nothing": tmp_path / "nothing", "port": used.getsockname()[1]}
        process = start(*(word.format(**names) for word in words))
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert errors.startswith("canopy: ")
    assert errors.count("\n") == 1
    assert said in errors


@pytest.mark.slow
def test_the_address_is_told_as_json_and_a_wider_one_with_a_warning(made):
    process = start(made.out, "--host", "0.0.0.0", "--json")
    try:
        lines = [process.stdout.readline() for _ in range(4)]
        assert json.loads("".join(lines))["url"].startswith("http://0.0.0.0:")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert "anybody who can reach 0.0.0.0" in errors
        assert "Traceback" not in errors
    finally:
        process.kill()
