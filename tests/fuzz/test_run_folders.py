"""Damaged run folders: a run that resumes ends with the same bits, or it is refused and the message has the file."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from grasp.checkpoint import run_folder
from grasp.checkpoint.run_state import RunState
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.errors import DistributedError, ResumeError
from grasp.files import tensors_digest
from grasp.model.batch import CalibrationBatch
from grasp.statistics.processes import Processes
from tests import many_processes
from tests.interrupted import CONFIG, REPORTED, run
from tests.test_recovery import in_folder, recovered
from tests.tiny_models import tiny_batches, tiny_model

BEST = GraspConfig.best(compression_ratio=0.1)
GENERATIONS = 6  # of a run folder that are damaged
CASES, SHORT = 500, 9  # per kind of run
TOGETHER = 25  # cases that a pair of processes does
Mutant = Callable[[Path, random.Random], None]
End = tuple[Any, ...]


@pytest.fixture(autouse=True)
def every_write(monkeypatch: pytest.MonkeyPatch) -> None:
    store_often(monkeypatch.setattr)


def store_often(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    set_attribute(run_folder, "INTERVAL", 0.0)
    set_attribute(run_folder, "WRITE_FRACTION", float("inf"))


@dataclass(frozen=True)
class Kind:
    """A kind of run. ``work(folder, progress, seed)`` starts or resumes it and returns its end."""

    work: Callable[[Path | None, Callable[[str, int, int], None], int], End]

    def folders(self, place: Path, seed: int) -> list[Path]:
        """Copies of the run folder at every step: what a kill would leave there."""
        copies: list[Path] = []

        def copy(step: str, done: int, total: int) -> None:
            if (place / f"run-{seed}" / "state.json").exists():
                copies.append(place / f"{seed}-{len(copies)}")
                shutil.copytree(place / f"run-{seed}", copies[-1])

        self.work(place / f"run-{seed}", copy, seed)
        return spread(copies)


def spread(copies: Sequence[Path]) -> list[Path]:
    """Some of the folders, from the first to the last, that have data files."""
    full = [copy for copy in copies if data_files(copy)]
    return [full[round(number * (len(full) - 1) / (GENERATIONS - 1))] for number in range(GENERATIONS)]


def data_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def silent(step: str, done: int, total: int) -> None:
    pass


def compressed(config: GraspConfig) -> Kind:
    def work(folder: Path | None, progress: Callable[[str, int, int], None], seed: int) -> End:
        report, weights = run(folder, config, progress=progress, seed=seed)
        return (*(getattr(report, name) for name in REPORTED), tensors_digest(weights.items()))

    return Kind(work)


def trained(folder: Path | None, progress: Callable[[str, int, int], None], seed: int) -> End:
    report, weights = recovered() if folder is None else in_folder(folder, seed=seed, progress=progress)
    return report.curve, report.best_step, tensors_digest(weights.items())


KINDS = {"paper": compressed(CONFIG), "best": compressed(BEST), "recover": Kind(trained)}


def delete(path: Path, chance: random.Random) -> None:
    path.unlink()


def truncate(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.choice((0, 1, 8, len(data) - 1, chance.randrange(len(data))))])


def extend(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.choice((b"\0", b" ", b"}")))


def flip_a_bit(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[position(data, chance)] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def change_a_character(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    place = position(data, chance)
    data[place] = chance.choice([byte for byte in range(32, 127) if byte != data[place]])
    path.write_bytes(data)


def position(data: bytes, chance: random.Random) -> int:
    """A byte of the length, the header, the notes or the tensors; of JSON, any one."""
    if data[:1] == b"{":
        return chance.randrange(len(data))
    header = 8 + int.from_bytes(data[:8], "little")
    notes = max(data.find(b"grasp"), 8)
    regions = [(0, 8), (8, header), (notes, min(notes + 120, header))]
    regions += [(header, len(data))] if header < len(data) else []
    return chance.randrange(*chance.choice(regions))


MUTANTS: Mapping[str, Mutant] = {
    mutant.__name__: mutant for mutant in (delete, truncate, extend, flip_a_bit, change_a_character)
}
FOREIGN = ("content of another run", "file of another run", "content of another file", "older copy", "older manifest")


def mutate(folder: Path, older: Sequence[Path], other: Path, chance: random.Random) -> tuple[str, str]:
    """Damage one file of a run folder; the damage and the name of the file."""
    path = chance.choice([*data_files(folder), folder / "state.json"])
    damage = chance.choice([*MUTANTS, *MUTANTS, *FOREIGN])
    if damage in MUTANTS:
        MUTANTS[damage](path, chance)
        return damage, path.name
    stem = path.name.split(".")[:-2]
    same = [file for file in data_files(other) if file.name.split(".")[:-2] == stem] or data_files(other)
    if damage == "content of another run":
        path.write_bytes((same[0] if stem else other / "state.json").read_bytes())
    elif damage == "file of another run":
        shutil.copy(same[0], folder)
    elif damage == "content of another file":
        path.write_bytes(chance.choice(data_files(folder)).read_bytes())
    elif damage == "older copy" and older:
        for file in data_files(chance.choice(older)):
            shutil.copy(file, folder)
    elif damage == "older manifest" and older:
        shutil.copy(chance.choice(older) / "state.json", folder)
        path = folder / "state.json"
    return damage, path.name


def cases(place: Path, own: Sequence[Path], other: Sequence[Path], count: int) -> Iterator[tuple[int, Path, str, str]]:
    """Damaged copies of the folders ``own``: number, folder, damage, file."""
    for number in range(count):
        chance = random.Random(number)
        generation = number % len(own)
        folder = place / f"case-{number}"
        shutil.copytree(own[generation], folder)
        yield number, folder, *mutate(folder, own[:generation], other[generation], chance)
        shutil.rmtree(folder, ignore_errors=True)


def check_refusal(error: ResumeError, folder: Path, name: str, case: str) -> None:
    message = str(error)
    assert str(folder) in message, f"{case}: {message}"
    assert name in message or name == "state.json", f"{case}: {message}"
    assert "delete" in message or "Repeat the original command" in message, f"{case}: {message}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_run_folder_gives_the_same_bits_or_is_refused(kind: str, tmp_path: Path, fuzzing: bool) -> None:
    work = KINDS[kind].work
    own, other = (KINDS[kind].folders(tmp_path, seed) for seed in (0, 1))
    expected = work(None, silent, 0)
    ends: Counter[str] = Counter()
    for number, folder, damage, name in cases(tmp_path, own, other, CASES if fuzzing else SHORT):
        case = f"{kind}, case {number}: {damage}, {name}"
        try:
            assert work(folder, silent, 0) == expected, case
            ends["same bits"] += 1
        except ResumeError as error:
            check_refusal(error, folder, name, case)
            ends["refused"] += 1
    print(f"\nrun folders, {kind}: {dict(ends)}")


def resume_together(processes: Processes, folder: Path, seed: int, copies: Path | None = None) -> End:
    """Two processes compress together; with ``copies``, their folder is copied there after every batch of a sweep."""
    count = 0

    def copy(step: str, done: int, total: int) -> None:
        nonlocal count
        if copies is not None and step.startswith("layer"):
            processes.least(0)  # nobody writes
            if processes.first:
                shutil.copytree(folder, copies / f"{seed}-{count:02}")
            count += 1
            processes.least(0)

    with ExitStack() as stack:
        state = RunState(folder, rank=processes.rank, processes=processes.size)
        with processes.fail_together():
            stack.enter_context(state)
        model, batches = tiny_model("llama", seed=seed), list(map(CalibrationBatch, tiny_batches(4)))
        report = compress_(model, batches, CONFIG, state=state, processes=processes, progress=copy)
    return (*(getattr(report, name) for name in REPORTED), tensors_digest(model.state_dict().items()))


def start_together(processes: Processes, place: Path) -> list[End]:
    store_often()
    return [resume_together(processes, place / f"run-{seed}", seed, place) for seed in (0, 1)]


def resume_damaged_together(processes: Processes, folders: Sequence[Path]) -> list[End | Exception]:
    store_often()
    ends: list[End | Exception] = []
    for folder in folders:
        try:
            ends.append(resume_together(processes, folder, 0))
        except (ResumeError, DistributedError) as error:
            ends.append(error)
    return ends


def test_two_processes_resume_to_the_same_bits_or_are_refused(tmp_path: Path, fuzzing: bool) -> None:
    if not fuzzing:
        pytest.skip("starting processes takes seconds; make fuzz runs this")
    started = many_processes.run(start_together, tmp_path)
    assert not any(outcome.error for outcome in started), started
    expected = started[0].value[0]
    own, other = (spread(sorted(tmp_path.glob(f"{seed}-*"))) for seed in (0, 1))
    ends: Counter[str] = Counter()
    for first in range(0, CASES, TOGETHER):
        place = tmp_path / f"from-{first}"
        pending = []
        for number in range(first, first + TOGETHER):
            folder = place / f"case-{number}"
            generation = number % len(own)
            shutil.copytree(own[generation], folder)
            pending.append((folder, *mutate(folder, own[:generation], other[generation], random.Random(number))))
        outcomes = many_processes.run(resume_damaged_together, [folder for folder, *_ in pending])
        assert not any(outcome.error for outcome in outcomes), outcomes
        for (folder, damage, name), *both in zip(pending, *(outcome.value for outcome in outcomes), strict=True):
            case = f"two processes, {folder.name}: {damage}, {name}"
            refusals = [end for end in both if isinstance(end, ResumeError)]
            if refusals:
                check_refusal(refusals[0], folder, name, case)
                assert all(isinstance(end, GRASP_ERRORS) for end in both), case
            else:
                assert both == [expected, expected], case
            ends["refused" if refusals else "same bits"] += 1
        shutil.rmtree(place)
    print(f"\nrun folders, two processes: {dict(ends)}")


GRASP_ERRORS = (ResumeError, DistributedError)

# What was found before the files were verified: kind of run, file, text in it, the text that takes its place.
CORPUS = {
    "a module is gone after the decision": ("best", "module-*.layers.1.mlp.up_proj*", None, None),
    "another number of batches that sums hold": ("paper", "sums-*", b'\\"done\\": 1', b'\\"done\\": 3'),
    "another step of the training": ("recover", "training*", b'\\"step\\": 1', b'\\"step\\": 3'),
    "another block influence": ("paper", "state.json", b"0.", b"1."),
    "a report without its key": ("paper", "module-*", b'\\"report\\"', b'\\"rexort\\"'),
}


@pytest.mark.parametrize("failure", CORPUS)
def test_failures_found_before_are_refused(failure: str, tmp_path: Path) -> None:
    kind, name, text, other = CORPUS[failure]
    for folder in reversed(KINDS[kind].folders(tmp_path, 0)):
        path = next((path for path in sorted(folder.glob(name)) if text is None or text in path.read_bytes()), None)
        if path is None:
            continue
        if text is None or other is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes().replace(text, other, 1))
        with pytest.raises(ResumeError, match=path.name):
            KINDS[kind].work(folder, silent, 0)
        return
    raise AssertionError(f"no generation of the folder has {name} with {text!r}")
