"""CPU seconds and memory of a compression, counted over all processes that worked on it."""

from __future__ import annotations

import json
import time
from pathlib import Path

from grasp.bench.memory import peak_bytes, reset_peak_bytes


class Ledger:
    """Counts what this process spends from now on, together with what earlier processes have noted in a file.

    Work that was lost with a killed process, and done again, is counted twice.

    Attributes:
        seconds: CPU seconds, as of the last ``note``.
        peak_bytes: most memory of a process above what it held at the start; ``None`` if unknown.

    Args:
        file: its JSON object is written by ``note``.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self._earlier = self.seconds = earlier.get("seconds", 0.0)
        self.peak_bytes: int | None = earlier.get("peak_bytes")
        self._held, self._start = reset_peak_bytes(), time.process_time()

    def note(self, step: str, done: int, total: int, *, besides: float = 0.0) -> None:
        """Write what was spent so far, and the running step for those who read the file.

        ``besides`` is the CPU seconds of earlier work whose results this process has used.
        """
        self.seconds = self._earlier + time.process_time() - self._start + besides
        if self._held is not None:
            self.peak_bytes = max(self.peak_bytes or 0, peak_bytes() - self._held)
        content = {"seconds": self.seconds, "peak_bytes": self.peak_bytes, "step": step, "done": done, "total": total}
        draft = self._file.with_suffix(".new")
        draft.write_text(json.dumps(content), encoding="utf-8")
        draft.replace(self._file)

    def remove(self) -> None:
        """Remove the file."""
        self._file.unlink(missing_ok=True)
