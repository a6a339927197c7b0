"""Several processes compress one model: they share the batches, add up their sums, and divide the decompositions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from grasp.errors import DistributedError
from grasp.formatting import one_line
from grasp.model.batch import CalibrationBatch

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

Item = TypeVar("Item")


class Transportable(Protocol):
    """A result that one process sends to the others."""

    def to_tensors(self) -> Mapping[str, Tensor]:
        """All of it, as named tensors."""
        ...

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of ``to_tensors``."""
        ...


Result = TypeVar("Result", bound=Transportable)

TIMEOUT = timedelta(minutes=30)  # for which a process waits for the others
BUCKET_BYTES = 2**28  # statistics are added up in messages of this size


@dataclass(frozen=True)
class Processes:
    """This process among the ones that compress one model; all have the same model, batches and configuration.

    The default process group of ``torch.distributed`` connects them. ``ALONE`` is a single process; its methods
    communicate nothing.

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
        return local + [_blank(batches[0])] * missing

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors over the processes, in place, in their own dtype. All get the same bits.

        Raises:
            DistributedError: if a process is gone.
        """
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            with self._connected():
                dist.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def map_divided(
        self, items: Sequence[Item], work: Callable[[Item], Result], result_type: type[Result]
    ) -> Iterator[tuple[Item, Result]]:
        """Do the work for each item in one of the processes, and give its result, bit for bit, to all.

        Args:
            items: the same in all processes.
            work: item → result.
            result_type: the class of the results.

        Returns:
            The items in their order, each with its result. A result from another process is on the CPU.

        Raises:
            DistributedError: if the work fails in another process, or a process is gone.
        """
        for start in range(0, len(items), self.size):
            turn = items[start : start + self.size]
            result = None
            with self.fail_together():
                if self.rank < len(turn):
                    result = work(turn[self.rank])
            for source, item in enumerate(turn):
                yield item, self._from(source, result, result_type)

    def least(self, number: int) -> int:
        """The smallest of the processes' numbers.

        Raises:
            DistributedError: if a process is gone.
        """
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

    def require_same(self, what: str, value: str) -> None:
        """Check that a value is the same in all processes.

        Raises:
            DistributedError: if a process has another value than the first.
        """
        if self.size == 1:
            return
        expected = self._broadcast(0, value.encode()).decode()
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

    def _from(self, source: int, result: Result | None, result_type: type[Result]) -> Result:
        """The ``result`` of the process ``source``."""
        if source == self.rank:
            assert result is not None
            if self.size > 1:
                tensors = {name: tensor.contiguous() for name, tensor in result.to_tensors().items()}
                self._broadcast(source, safetensors.torch.save(tensors))
            return result
        return result_type.from_tensors(safetensors.torch.load(self._broadcast(source, b"")))

    def _broadcast(self, source: int, data: bytes) -> bytes:
        """The ``data`` of the process ``source``."""
        length = torch.tensor([len(data)])
        with self._connected():
            dist.broadcast(length, source)
            buffer = torch.zeros(int(length), dtype=torch.uint8)
            if source == self.rank:
                buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else buffer
            dist.broadcast(buffer, source)
        return buffer.numpy().tobytes()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> DistributedError:
        return DistributedError(
            f"process {self.rank} of {self.size} has lost the others: one of them has ended, or is more than {TIMEOUT} "
            f"h behind. Its own message has the reason; start all of them again ({one_line(error)})"
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


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of tensors of one dtype on one device, in order, of at most ``BUCKET_BYTES`` or a single tensor."""
    kinds = {(tensor.dtype, tensor.device): None for tensor in tensors}
    for kind in kinds:
        bucket: list[Tensor] = []
        for tensor in (tensor for tensor in tensors if (tensor.dtype, tensor.device) == kind):
            if bucket and sum(member.nbytes for member in bucket) + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket
