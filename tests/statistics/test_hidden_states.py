from __future__ import annotations

import errno
import io
import tempfile
from pathlib import Path

import pytest
import torch

from grasp.errors import ResumeError
from grasp.statistics.hidden_states import HiddenStates, Scratch


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Batches of different sizes, as the last one may be smaller."""
    torch.manual_seed(0)
    return [torch.randn(size, 3, 4).to(dtype) for size in (2, 2, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("in_memory", [0, 1, 2, 3])
def test_states_are_the_same_bits_in_memory_and_in_a_file(in_memory: int, dtype: torch.dtype, tmp_path: Path) -> None:
    given = tensors(dtype)
    given[0][0, 0, :2] = torch.tensor([float("nan"), -0.0])
    limit = sum(tensor.nbytes for tensor in given[:in_memory])
    scratch = Scratch(tmp_path, limit)
    states = HiddenStates(scratch)
    for tensor in given:
        states.append(tensor)
    assert scratch.held == limit
    assert len(states) == 3
    for read, tensor in zip(reversed(states), reversed(given), strict=True):  # in another order than written
        assert (read.dtype, read.shape) == (dtype, tensor.shape)
        assert torch.equal(read.contiguous().view(torch.uint8), tensor.view(torch.uint8))
    assert torch.equal(states[-1], given[-1])
    with pytest.raises(IndexError):
        states[3]
    assert list(tmp_path.iterdir()) == []  # the file has no name


@pytest.mark.parametrize("memory", [0, None])
def test_states_are_copies_without_a_graph(memory: int | None) -> None:
    states, given = HiddenStates(Scratch(memory=memory)), torch.ones(1, 2, 3, requires_grad=True)
    output = (2 * given).mT  # not contiguous
    states.append(output)
    with torch.no_grad():
        output.zero_()
    assert torch.equal(states[0], torch.full((1, 3, 2), 2.0))
    assert not states[0].requires_grad


def test_states_may_be_read_between_two_writes() -> None:
    states, given = HiddenStates(Scratch(memory=0)), tensors()
    for index, tensor in enumerate(given):
        states.append(tensor)
        assert torch.equal(states[0], given[0])
        assert torch.equal(states[index], tensor)


def test_memory_is_given_back_when_the_object_is_gone() -> None:
    given = tensors()
    scratch = Scratch(memory=2 * given[0].nbytes)
    first, second = HiddenStates(scratch), HiddenStates(scratch)
    first.append(given[0])
    second.append(given[1])
    assert scratch.held == 2 * given[0].nbytes
    del first
    assert scratch.held == given[0].nbytes
    second.append(given[0])  # takes the place of the first
    assert scratch.held == 2 * given[0].nbytes
    del second
    assert scratch.held == 0


class FullDisk(io.BytesIO):
    """A file on a disk without free space."""

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: FullDisk())
    [tensor, *_] = tensors()
    scratch = Scratch(tmp_path, memory=tensor.nbytes)
    states = HiddenStates(scratch)
    states.append(tensor)
    with pytest.raises(ResumeError, match=r"No space left on device\. Free disk space, or give more memory") as error:
        states.append(tensor)
    assert str(tmp_path) in str(error.value)
    assert torch.equal(states[0], tensor)
    assert len(states) == 1


def test_a_folder_that_takes_no_files_is_told_with_a_remedy(tmp_path: Path) -> None:
    states = HiddenStates(Scratch(tmp_path / "missing", memory=0))
    with pytest.raises(ResumeError, match=r"missing.*Free disk space, or give more memory"):
        states.append(torch.ones(1, 1, 1))


def test_a_file_that_lost_its_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: file)
    states = HiddenStates(Scratch(memory=0))
    states.append(torch.ones(1, 2, 3))
    file.truncate(20)
    with pytest.raises(ResumeError, match="shorter than what was written"):
        states[0]
