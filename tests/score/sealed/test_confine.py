"""What a confined program can and cannot do; each refusal beside the same program without confinement."""

import subprocess
import sys

import pytest

from canopy.errors import SealError
from canopy.score.sealed import cage
from canopy.score.sealed.confine import readable, refuse_within_reach, run
from canopy.score.sealed.task import Budget

landlocked = pytest.mark.skipif(not cage.landlock_version(), reason="this kernel has no Landlock")


def budget(seconds=20.0, memory_mib=500):
    return Budget(seconds=seconds, parameters=1, memory_mib=memory_mib, threads=1)


@pytest.fixture
def room(tmp_path):
    """A secret, and a folder to work in beside it."""
    (tmp_path / "labels").write_text("heights")
    (tmp_path / "work").mkdir()
    return tmp_path


def confined(room, code, *, read=(), **limits):
    return run([sys.executable, "-I", "-S", "-c", code], read=read, write=room / "work", budget=budget(**limits))


def free(code):
    return subprocess.run([sys.executable, "-I", "-S", "-c", code], check=False, capture_output=True).returncode


@landlocked
@pytest.mark.parametrize(
    "what",
    [
        "open('{room}/labels').read()",
        "import os; os.listdir('{room}')",
        "open('{room}/planted', 'w')",
        "import os; os.rename('{room}/work', '{room}/moved'); os.rename('{room}/moved', '{room}/work')",
        "import os; open('/proc/' + str(os.getppid()) + '/environ', 'rb').read()",
    ],
)
def test_what_is_not_given_is_out_of_reach(room, what):
    code = what.format(room=room)
    assert free(code) == 0, "it works where nothing is in its way"
    ran = confined(room, code)
    assert ran.code == 1
    assert "Permission denied" in ran.said or "cross-device" in ran.said
    assert ran.means.startswith("Landlock")


@landlocked
def test_a_link_is_no_way_around(room):
    (room / "work" / "way").symlink_to(room / "labels")
    code = f"open('{room}/work/way').read()"
    assert free(code) == 0
    assert "Permission denied" in confined(room, code).said
    assert confined(room, f"import os; os.link('{room}/labels', '{room}/work/own')").code == 1
    assert not (room / "work" / "own").exists()


def test_what_is_given_is_within_reach(room):
    ran = confined(room, f"open('own', 'w').write(open('{room}/labels').read())", read=(room / "labels",))
    assert (ran.ended, ran.code) == ("itself", 0), ran.said
    assert (room / "work" / "own").read_text() == "heights"


def test_the_environment_is_clean(room, monkeypatch):
    monkeypatch.setenv("THE_KEY", str(room / "labels"))
    code = "import os, sys; sys.exit('THE_KEY' in os.environ or 'PYTHONPATH' in os.environ)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 1
    assert confined(room, code).code == 0


@landlocked
def test_there_is_no_network(room):
    code = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()"
    assert free(code) == 0
    assert confined(room, code).code == 1


def test_time_is_enforced_with_everything_that_was_started(room):
    sleep = "import time; time.sleep(60)"
    code = f"import subprocess; subprocess.Popen(['{sys.executable}', '-c', '{sleep}']); {sleep}"
    ran = confined(room, code, seconds=0.5)
    assert ran.ended == "out of time"
    assert 0.5 <= ran.seconds < 5


def test_memory_is_enforced(room):
    code = "import time; x = bytearray(200 << 20); time.sleep({})"
    assert confined(room, code.format(0), memory_mib=400).ended == "itself"
    ran = confined(room, code.format(30), memory_mib=100)
    assert ran.ended == "out of memory"
    assert ran.memory_mib > 100


def test_a_key_within_reach_of_programs_is_refused(room):
    refuse_within_reach(room / "labels")
    with pytest.raises(SealError, match="which a submitted model's process can read; move it elsewhere"):
        refuse_within_reach(next(place for place in readable() if place.is_dir()) / "secret.key")
    with pytest.raises(SealError, match="can read"):
        refuse_within_reach(room / "work" / "secret.key", (room / "work",))
