"""Records which ops a run calls, of this process or of a command, and reads the file again."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from grasp.bench.recorded import RecordedCall, Recording
from grasp.bench.schema import LineError, from_dict
from grasp.bench.signals import handling
from grasp.errors import GraspError, ResultsError
from grasp.files import require_writable, write_whole
from grasp.formatting import json_text, one_line
from grasp.method.storage import format_storages, parse_storages
from grasp.reading import read_json

_EXPECTED = "a workload that grasp bench record wrote"
NOTHING = "no low-rank op of grasp_kernels was called; expected a run of a compressed model"


@contextmanager
def record_workload(path: str | Path) -> Iterator[None]:
    """Record the low-rank ops that this process calls in the block, and write them to a file.

    All threads are recorded, and processes that are forked in the block. Calls take 10 to 20 µs longer. The file is
    also written if the block raises.

    Args:
        path: the file, for ``grasp bench ops --workload``. It is replaced.

    Raises:
        GraspError: if the file cannot be written, or no op was called.

    Example:
        >>> import tempfile, torch
        >>> from grasp.bench.recording import read_recording, record_workload
        >>> from grasp_kernels import lowrank_linear
        >>> U, Vh = torch.randn(32, 8), torch.randn(8, 64)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with record_workload(Path(folder, "workload.json")):
        ...         for _ in range(3):
        ...             y = lowrank_linear(torch.randn(2, 64), U, None, Vh)
        ...     (call,) = read_recording(Path(folder, "workload.json")).calls
        >>> call.op, call.shape, call.rows, call.count
        ('lowrank_linear', '64x32r8', 2, 3)
    """
    from grasp_kernels.recording import recording_to

    require_writable(Path(path))
    with TemporaryDirectory(prefix="grasp-record-") as folder:
        try:
            with recording_to(Path(folder)):
                yield
        finally:
            recording = _collect(Path(folder))
            _save(recording, Path(path))
    if not recording.calls:
        raise GraspError(f"{NOTHING}; {path} is not written")


def record_command(command: Sequence[str], output: Path, environment: Mapping[str, str]) -> tuple[int, Recording]:
    """Run a command, and write the low-rank ops that it and all processes it starts call to a file.

    Ctrl-C and the signals that end this process reach the command, and are waited for.

    Returns:
        The command's exit code as shells give it, and the recording. There is no file if the latter has no calls.

    Raises:
        GraspError: if the file cannot be written, or the command cannot be started.
    """
    require_writable(output)
    with TemporaryDirectory(prefix="grasp-record-", ignore_cleanup_errors=True) as folder:
        code = _run(command, {**environment, "GRASP_RECORD": folder})  # read by grasp_kernels.recording
        recording = _collect(Path(folder))
    _save(recording, output)
    return code, recording


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    children: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        for child in children:
            child.send_signal(number)

    # A terminal sends Ctrl-C to the command as well.
    with handling({signal.SIGINT: lambda *_: None, signal.SIGTERM: forward, signal.SIGHUP: forward}):
        try:
            children.append(child := subprocess.Popen(command, env=environment))
        except OSError as error:
            text = f"{command[0]} cannot be started: {error.strerror}; expected a command and its arguments"
            raise GraspError(text) from error
        for number in received:  # while the command was started
            child.send_signal(number)
        while (code := child.poll()) is None:  # Python sees a signal just before a blocking wait only after it
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=1)
    return code if code >= 0 else 128 - code


def read_recording(path: str | Path) -> Recording:
    """Read a file of ``grasp bench record``.

    Raises:
        ResultsError: if it is not such a file, is of another version or empty, or a call is not possible.

    Example:
        >>> read_recording("/dev/null")
        Traceback (most recent call last):
        grasp.errors.ResultsError: /dev/null is a device; expected a workload that grasp bench record wrote
    """
    try:
        recording = from_dict(read_json(path, _EXPECTED, ResultsError), (Recording,))
        assert isinstance(recording, Recording)
        for index, call in enumerate(recording.calls):
            _check(call, f"calls[{index}]")
    except LineError as error:
        raise ResultsError(f"{path}: {error}") from error
    if not recording.calls:
        raise ResultsError(f"{path} has no calls: {NOTHING}")
    return recording


def _check(call: RecordedCall, place: str) -> None:
    from grasp.bench.workloads import OPS
    from grasp_kernels.checks import DTYPES
    from grasp_kernels.shapes import parse_forms, parse_shape

    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    for name, value, known in (("op", call.op, list(OPS)), ("dtype", call.dtype, dtypes)):
        if value not in known:
            raise LineError(f"{place} has the unknown {name} {value!r}, known are {', '.join(known)}")
    if call.rows < 1 or call.count < 1:
        raise LineError(f"{place} has {call.rows} rows and the count {call.count}, both must be at least 1")
    try:
        shape = parse_shape(call.shape)
        if OPS[call.op].fit(shape) != shape:
            raise ValueError(f"{call.op} does not take the shape {call.shape}")
        plain = not any((*parse_forms(call.form, len(shape)), *parse_storages(call.weights, len(shape))))
        if not plain and call.op == "singular_value_grad":
            raise ValueError("singular_value_grad takes no pivoted and no quantised factors")
    except ValueError as error:
        raise LineError(f"{place}: {one_line(error)}") from error


def _collect(folder: Path) -> Recording:
    from grasp_kernels.recording import read_folder
    from grasp_kernels.shapes import format_forms, format_shape

    processes, counts = read_folder(folder)
    calls = [
        RecordedCall(
            call.op,
            format_shape(call.shape),
            format_forms(call.pivoted),
            call.rows,
            call.dtype,
            call.device,
            call.captured,
            count,
            format_storages(call.weights),
        )
        for call, count in counts.items()
        if count
    ]
    return Recording(processes, tuple(sorted(calls, key=lambda call: (-call.count, call.op, call.shape, call.rows))))


def _save(recording: Recording, path: Path) -> None:
    """Write the file, unless there are no calls."""
    if recording.calls:
        write_whole(path, json_text(recording.to_dict()))
