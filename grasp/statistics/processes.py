"""Several processes compress one model: they share the batches, add up their sums, and divide the decompositions."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from grasp.errors import DistributedError
from grasp.formatting import one_line
from grasp.model.batch import CalibrationBatch

Item = TypeVar("Item")
Result = TypeVar("Result", str, dict[str, Tensor])  # what one process sends to the others

TIMEOUT = timedelta(minutes=30)  # for which a process waits for the others


@dataclass(frozen=True)
class Processes:
    """This process among the ones that compress one model; all have the same model, batches and configuration.

    The default process group of ``torch.distributed`` connects them. ``ALONE`` is a single process; its methods
    communicate nothing. With others, all of them raise a ``DistributedError`` if a process is gone.

    Example:
        >>> second_of_two = Processes(rank=1, size=2)
        >>> second_of_two.first
        False
        >>> batches = [CalibrationBatch(torch.full((1, 4), number)) for number in range(4)]
        >>> [int(batch.input_ids[0, 0]) for batch in second_of_two.local_batches(batches)]
        [1, 3]
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False  # the weights are spread over the processes, see ``grasp.statistics.sharding``

    @property
    def first(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    def local_batches(self, batches: Sequence[CalibrationBatch]) -> list[CalibrationBatch]:
        """The batches of this process. All processes get the same number: batches of padding fill up the last ones."""
        local = list(batches[self.rank :: self.size])
        missing = -(-len(batches) // self.size) - len(local)
        return local + [_blank(batches[0]) for _ in range(missing)]

    def owner(self, index: int) -> int:
        """The rank of the process that ``map_divided`` gives item number ``index``."""
        return index % self.size

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors over the processes, in place, in their own dtype. All get the same bits."""
        self.reduce_([(tensor, range(self.size)) for tensor in tensors])

    def reduce_(self, tensors: Sequence[tuple[Tensor, Collection[int]]]) -> None:
        """Add up each tensor over the processes, in place, in its own dtype, for the processes that need it.

        Args:
            tensors: (tensor, ranks); the same shapes and ranks in all processes. A tensor that one process needs is
                sent to that process alone, and its value in the others is then undefined. A tensor that several
                processes need is added up in all, which get the same bits.
        """
        if self.size == 1:
            return
        for tensor, ranks in tensors:
            sums = tensor.contiguous()
            with self._connected():
                if len(ranks) == 1:
                    dist.reduce(sums, min(ranks))
                else:
                    dist.all_reduce(sums)
            if not tensor.is_contiguous():
                tensor.copy_(sums)

    def map_divided(
        self,
        items: Sequence[Item],
        work: Callable[..., Result],
        *,
        fetch: Callable[[Item], Any] | None = None,
    ) -> Iterator[tuple[Item, Result]]:
        """Do the work for each item in its owner, and give its result, bit for bit, to all.

        Args:
            items: the same in all processes; item number ``index`` belongs to ``owner(index)``.
            work: item → result; with ``fetch``, (item, fetched value) → result.
            fetch: item → what its work needs besides. If the model is sharded, all processes call it for every item in
                the same order, so it may gather weights; only the owner keeps the value.

        Returns:
            The items in their order, each with its result. A result from another process is on the CPU.

        Raises:
            DistributedError: if the work fails in another process, or a process is gone.
        """
        for start in range(0, len(items), self.size):
            turn = items[start : start + self.size]
            result = None
            with self.fail_together():
                arguments = self._fetched(turn, fetch) if fetch else turn[self.rank : self.rank + 1]
                if arguments:
                    result = work(*arguments)
                del arguments
            for source, item in enumerate(turn):
                yield item, self._from(source, result)

    def _fetched(self, turn: Sequence[Item], fetch: Callable[[Item], Any]) -> tuple[Any, ...]:
        """The item of this process and its fetched value; () if there is no item for this process."""
        arguments: tuple[Any, ...] = ()
        for rank, item in enumerate(turn):
            if rank == self.rank:
                arguments = (item, fetch(item))
            elif self.sharded:
                fetch(item)
        return arguments

    def least(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        result = torch.tensor(number)
        if self.size > 1:
            with self._connected():
                dist.all_reduce(result, dist.ReduceOp.MIN)
        return int(result)

    def fail_together(self) -> ExitStack:
        """A context in which an error of one process ends all.

        The process that failed raises its error, the others raise a ``DistributedError`` with its message. If the model
        is sharded, the process leaves the process group instead, since the others may be waiting for its weights.
        """
        stack = ExitStack()
        if self.size > 1:
            stack.push(self._settle)
        return stack

    def wait_for_all(self) -> None:
        """Return when all processes have called this; then no one reads the files of an earlier step any more."""
        self.least(0)

    def from_first(self, text: str) -> str:
        """The text of the first process."""
        return text if self.size == 1 else self._broadcast(0, text.encode()).decode()

    def require_same(self, what: str, value: str) -> None:
        """Check that a value is the same in all processes; if not, a ``DistributedError``."""
        expected = self.from_first(value)
        with self.fail_together():
            if value != expected:
                raise DistributedError(f"{what} differs from that of process 0; give all processes the same")

    def _settle(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Exchange with the others which process has failed."""
        if error is not None and not isinstance(error, Exception):
            return  # an interrupt; the others see the closed connection
        if self.sharded:
            if error is not None:
                self._leave(error)
            return
        failed = torch.zeros(self.size, dtype=torch.int64)
        failed[self.rank] = error is not None
        with self._connected():
            dist.all_reduce(failed)
        if failed.any():
            source = int(failed.argmax())
            reason = self._broadcast(source, (one_line(error, None) if error else "").encode()).decode()
            if error is None:
                raise DistributedError(f"process {source} of {self.size} failed: {reason}")

    def _leave(self, error: Exception) -> None:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise self._lost(error) from error
        dist.destroy_process_group()

    def _from(self, source: int, result: Any) -> Any:
        """The ``result`` of the process ``source``: a text, or the names, dtypes and shapes of tensors, then these."""
        if self.size == 1:
            return result
        if source == self.rank:
            tensors = {} if isinstance(result, str) else result
            header = [(name, str(t.dtype)[6:], t.shape) for name, t in tensors.items()]
            self._broadcast(source, json.dumps(result if isinstance(result, str) else header).encode())
            for tensor in tensors.values():
                self._broadcast_(source, tensor.detach().cpu().contiguous())
            return result
        header = json.loads(self._broadcast(source, b""))
        if isinstance(header, str):
            return header
        received = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in header}
        for tensor in received.values():
            self._broadcast_(source, tensor)
        return received

    def _broadcast(self, source: int, data: bytes) -> bytes:
        """The ``data`` of the process ``source``."""
        length = torch.tensor([len(data)])
        self._broadcast_(source, length)
        buffer = torch.zeros(int(length), dtype=torch.uint8)
        if source == self.rank and data:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._broadcast_(source, buffer)
        return buffer.numpy().tobytes()

    def _broadcast_(self, source: int, tensor: Tensor) -> None:
        """Set a contiguous tensor on the CPU to that of the process ``source``."""
        with self._connected():
            dist.broadcast(tensor.view(-1).view(torch.uint8), source)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> DistributedError:
        return DistributedError(
            f"process {self.rank} of {self.size} has lost the others: one of them has ended, or is more than {TIMEOUT} "
            f"(h:mm:ss) behind. Its own message has the reason; start all of them again ({one_line(error)})"
        )


ALONE = Processes()


@contextmanager
def joined(device: torch.device, *, sharded: bool = False) -> Iterator[Processes]:
    """Connect to the processes that ``torchrun`` started with this one, until the block ends.

    Args:
        device: of this process.
        sharded: whether the model will be sharded, see ``grasp.statistics.sharding``.

    Raises:
        DistributedError: if they cannot be reached.

    Example:
        >>> import os
        >>> from unittest import mock
        >>> torchrun = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
        >>> with mock.patch.dict(os.environ, torchrun), joined(torch.device("cpu")) as processes:
        ...     processes.rank, processes.size
        (0, 1)
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"the other processes cannot be reached ({one_line(error)}); start them with torchrun"
        ) from error
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), sharded)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _blank(like: CalibrationBatch) -> CalibrationBatch:
    """A batch of two padding tokens."""
    ids = like.input_ids[:1, :2]
    return CalibrationBatch(ids, torch.zeros_like(ids, dtype=torch.bool))
