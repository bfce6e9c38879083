"""Checkpoint files: whole, or not there."""

import pytest
import torch

from canopy.model.checkpoints import WholeFiles, checkpoint_path, checkpoints, damage, read_checkpoint


def content(value: float) -> dict:
    return {"state_dict": {"weight": torch.full((1000,), value)}, "global_step": 3}


def test_what_is_written_can_be_read(tmp_path):
    io, path = WholeFiles(), checkpoint_path(tmp_path, 3)
    io.save_checkpoint(content(1.0), path)
    assert io.failure == ""
    assert damage(path) is None
    assert checkpoints(tmp_path) == [path]
    assert torch.equal(read_checkpoint(path)["state_dict"]["weight"], torch.ones(1000))
    assert torch.equal(io.load_checkpoint(path)["state_dict"]["weight"], torch.ones(1000))
    io.save_checkpoint(content(2.0), checkpoint_path(tmp_path, 12))
    assert [p.stem for p in checkpoints(tmp_path)] == ["step-0000012", "step-0000003"]
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.parametrize("harm", ["cut", "empty", "flip"])
def test_damage_is_seen(tmp_path, harm):
    io, path = WholeFiles(), checkpoint_path(tmp_path, 3)
    io.save_checkpoint(content(1.0), path)
    data = bytearray(path.read_bytes())
    if harm == "flip":  # one bit of one weight
        data[data.index(torch.ones(8).numpy().tobytes()) + 2] ^= 1
    path.write_bytes({"cut": data[:-100], "empty": b"", "flip": data}[harm])
    assert damage(path)


def test_a_full_disk_leaves_the_checkpoint_that_was_there(small_disk):
    disk = small_disk(64 * 1024)
    io, path = WholeFiles(), checkpoint_path(disk, 1)
    io.save_checkpoint(content(1.0), path)
    assert io.failure == ""
    big = {"state_dict": {"weight": torch.ones(100_000)}}
    io.save_checkpoint(big, checkpoint_path(disk, 2))
    assert "No space left" in io.failure
    assert list(path.parent.iterdir()) == [path]
    assert damage(path) is None
    io.save_checkpoint(content(2.0), checkpoint_path(disk, 3))
    assert io.failure == ""
