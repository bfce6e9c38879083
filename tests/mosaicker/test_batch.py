"""How many windows go through a network at once: what is found, what is remembered, and what when it does not fit."""

import json

import pytest

from canopy.errors import ContractError, DeviceMemoryError
from canopy.model.package import load_model
from canopy.mosaicker.batch import Batch, find_batch, free_bytes, lanes_that_fit, recall, search
from canopy.mosaicker.ensemble import Ensemble
from tests.plain_models import plain_model


def alone(**options):
    return Ensemble(models=(plain_model(**options),))


def test_a_cpu_takes_one_window_a_core_and_refuses_more(tiny_model):
    ensemble = Ensemble(models=(load_model(tiny_model),))
    for asked in (None, 1):
        batch = find_batch(ensemble, asked)
        assert (batch.size, batch.lanes, batch.remembered) == (1, None, None)
    with pytest.raises(ContractError, match="batch 2 must be 1 on a CPU"):
        find_batch(ensemble, 2)
    with pytest.raises(ContractError, match="batch 0 is below 1"):
        find_batch(ensemble, 0)


@pytest.mark.parametrize(("most", "found"), [(1, 1), (2, 2), (5, 4), (8, 8)])
def test_the_search_ends_where_memory_does(tmp_path, most, found):
    """A network that takes as long over many windows as over one: the more at once the better."""
    path = tmp_path / "cache" / "batch.json"
    batch = search(alone(most=most, wait_s=0.02), path)
    assert (batch.size, batch.remembered) == (found, path)
    again = recall(path)
    assert (again.size, again.found, again.remembered) == (found, "remembered", path)
    memory = json.loads(path.read_text())
    assert list(memory["window_ms"]) == [str(2**power) for power in range(found.bit_length())]
    assert (memory["model"], memory["device"]) == ("plain", "cpu")
    assert not list(path.parent.glob(".*")), "no unfinished file is left"


def test_the_search_ends_where_more_windows_save_nothing(tmp_path):
    network = alone(wait_s=lambda x_bchw: 0.03 * len(x_bchw) ** 1.5)
    assert search(network, tmp_path / "batch.json").size == 1
    assert max(network.models[0].network.batches) == 2


def test_a_device_without_memory_for_one_window_is_said(tmp_path):
    with pytest.raises(DeviceMemoryError, match="not enough memory for 1 window of 64 x 64 px through plain"):
        search(alone(most=0), tmp_path / "batch.json")
    assert not (tmp_path / "batch.json").exists()


def test_running_out_of_memory_is_remembered(tmp_path):
    path = tmp_path / "batch.json"
    batch = search(alone(most=8, wait_s=0.02), path)
    batch.halve()
    assert (batch.size, recall(path).size) == (4, 4)
    assert batch.record()["windows_at_once"] == 4


def test_what_cannot_be_remembered_is_searched_again(tmp_path):
    path = tmp_path / "batch.json"
    assert recall(path) is None
    for text in ("", "{}", '{"device": "a", "model": "b", "batch": 0, "window_ms": {}}'):
        path.write_text(text)
        assert recall(path) is None
    (tmp_path / "file").write_text("")
    batch = search(alone(most=2, wait_s=0.02), tmp_path / "file" / "batch.json")
    assert (batch.size, batch.remembered) == (2, None)
    assert "not remembered" in batch.found


def test_lanes_are_as_many_as_cores_and_memory_allow():
    assert lanes_that_fit(8, 1) == lanes_that_fit(8, 0) == 8
    assert lanes_that_fit(8, 1 << 60) == 1
    some = free_bytes() // 4
    assert 2 <= lanes_that_fit(8, some) <= 4
    assert Batch(size=3, lanes=2).record() == {"windows_at_once": 6, "batch": 3, "lanes": 2, "found": "given"}
