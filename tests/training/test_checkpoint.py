"""Checkpoints: the one before is kept, damage is survived, a full disk is a sentence."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from steersman.runtime.errors import UserError
from steersman.training.checkpoint import load, save


def write(path: Path, *values: float) -> None:
    for value in values:
        save(path, partial(np.save, arr=np.array([value])))


def test_the_newest_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.npy", 1, 2)
    assert load(tmp_path / "a.npy", np.load) == 2


def test_there_may_be_none(tmp_path: Path) -> None:
    assert load(tmp_path / "a.npy", np.load) is None


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"rubbish"])
def test_a_damaged_one_gives_way_to_the_one_before(
    tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.npy", 1, 2)
    (tmp_path / "a.npy").write_bytes(damage)
    assert load(tmp_path / "a.npy", np.load) == 1
    assert "a.npy is damaged; going on from the checkpoint before it" in capsys.readouterr().err


def test_two_damaged_ones_are_a_sentence(tmp_path: Path) -> None:
    write(tmp_path / "a.npy", 1, 2)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="delete both"):
        load(tmp_path / "a.npy", np.load)


def test_a_full_disk_is_a_sentence_and_leaves_the_checkpoint(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        path.write_bytes(b"\x93NUM")
        raise OSError(errno.ENOSPC, "No space left on device")

    write(tmp_path / "a.npy", 1, 2)
    with pytest.raises(UserError, match=r"a\.npy: the checkpoint cannot be written \(No space left on device\)"):
        save(tmp_path / "a.npy", full)
    assert load(tmp_path / "a.npy", np.load) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"a.npy", "a.previous.npy"}
