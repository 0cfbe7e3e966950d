import errno
import resource
import shutil
from pathlib import Path

import pytest
import torch

from drift.contract import StorageError
from drift.storage import (
    AtomicCheckpointIO,
    damage,
    leftovers,
    link,
    temporary,
)

WEIGHTS = {"w": torch.arange(50_000.0)}  # 200 kB


@pytest.fixture
def small_disk():
    """No file may grow beyond 100 kB: the system refuses the rest, as it does when a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    AtomicCheckpointIO().save_checkpoint(WEIGHTS, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def value(path: Path) -> object:
    return torch.load(path, weights_only=True)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, small_disk):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)
    with pytest.raises(StorageError, match=r"last\.ckpt: .* cannot be written \(File too large\); the one b"):
        io.save_checkpoint(WEIGHTS, path)
    assert value(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    with pytest.raises(StorageError, match=r"best\.ckpt: .*; there is none before it; free space or mount"):
        io.save_checkpoint(WEIGHTS, tmp_path / "best.ckpt")


def test_a_lost_mount_is_not_written_beside(tmp_path: Path):
    io, folder = AtomicCheckpointIO(), tmp_path / "mount" / "checkpoints"
    io.save_checkpoint({"step": 1}, folder / "last.ckpt")
    shutil.rmtree(tmp_path / "mount")
    with pytest.raises(StorageError, match=r"checkpoints/last\.ckpt: .* \(No such file or directory\)"):
        io.save_checkpoint({"step": 2}, folder / "last.ckpt")
    assert not (tmp_path / "mount").exists()


def test_a_checkpoint_appears_whole_or_not_at_all(whole: Path, monkeypatch):
    seen = []

    def half(checkpoint: object, file) -> None:
        file.write(b"half of it")
        file.flush()
        seen.append((damage(whole), [path.name for path in leftovers(whole.parent)]))
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({}, whole)
    assert seen == [(None, [".last.ckpt.tmp"])]
    assert not leftovers(whole.parent)
    assert torch.equal(value(whole)["w"], WEIGHTS["w"])


def test_both_names_of_a_checkpoint_outlive_the_next(whole: Path):
    previous = whole.with_name("previous.ckpt")
    link(whole, previous)
    AtomicCheckpointIO().save_checkpoint({"step": 2}, whole)
    assert value(whole) == {"step": 2}
    assert torch.equal(value(previous)["w"], WEIGHTS["w"])
    link(whole, previous)
    assert value(previous) == {"step": 2}


def test_a_disk_without_second_names_keeps_the_one_before_all_the_same(whole: Path, monkeypatch):
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    previous = whole.with_name("previous.ckpt")
    link(whole, previous)
    assert torch.equal(value(previous)["w"], WEIGHTS["w"])
    assert not leftovers(whole.parent)
    AtomicCheckpointIO().save_checkpoint({"step": 2}, whole)
    link(whole, previous)
    assert value(previous) == {"step": 2}


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_what_is_cut_short_is_damaged(whole: Path, share: float):
    content = whole.read_bytes()
    whole.write_bytes(content[: int(len(content) * share)])
    assert "cut short or no checkpoint" in (damage(whole) or "")


def test_one_bit_is_enough(whole: Path):
    assert damage(whole) is None
    content = whole.read_bytes()
    for place in range(1000, len(content) - 2000, 10_001):
        flipped = bytearray(content)
        flipped[place] ^= 1
        whole.write_bytes(flipped)
        assert "changed since it was written" in (damage(whole) or ""), place


@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04", b"\x80\x02}q\x00."])
def test_foreign_files_are_no_checkpoints(tmp_path: Path, content: bytes):
    (tmp_path / "a.ckpt").write_bytes(content)
    assert "no checkpoint" in (damage(tmp_path / "a.ckpt") or "")
    assert damage(tmp_path / "none.ckpt") is not None


def test_temporary_names_are_hidden_beside_the_target():
    assert temporary(Path("a/last.ckpt")) == Path("a/.last.ckpt.tmp")
