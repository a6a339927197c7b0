from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.gpu.aot_cases import (
    CARDS,
    AotCase,
    barrier_complaints,
    cases,
    complaints,
    dependent_complaints,
)
from benchmarks.gpu.sass import ARCHITECTURES, SHARED_LIMITS, Binary
from grasp_kernels.triton.launch import Launch

ROOT = Path(__file__).parents[3]
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """One configuration of each kernel for each architecture, made in another process: here they are interpreted."""
    output = tmp_path_factory.mktemp("aot") / "aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "benchmarks.gpu.aot", "--representative", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert output.exists(), done.stderr
    return json.loads(output.read_text())["rows"]


def binary(rows: Rows, kernel: str, case: str, architecture: int = 90) -> dict[str, Any]:
    (row,) = (
        row for row in rows if (row["kernel"], row["architecture"]) == (kernel, architecture) and case in row["case"]
    )
    return row


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_to_what_it_should_be(rows: Rows, architecture: int) -> None:
    found = [row for row in rows if row["architecture"] == architecture]
    kernels = {launch.kernel.__name__ for case in representatives() for launch in case.launches(CARDS[80])}
    assert {row["kernel"] for row in found} == kernels
    assert [(row["kernel"], row["case"], row["complaints"]) for row in found if row["complaints"]] == []


@pytest.mark.slow
def test_the_gradient_kernel_is_the_one_that_was_designed(rows: Rows) -> None:
    row = binary(rows, "_singular_value_grad_kernel", "")
    assert set(row["tensor_core"]) == {"HGMMA"}
    assert row["registers"] <= 192  # two accumulators of 64 and room: above, the warps would wait for each other
    assert row["shared"] == 3 * (128 + 128) * 64 * 2  # three stages of two 16-bit tiles
    assert set(row["loads"]) <= {"1", "4", "16"}  # the mask, the bounds, everything else


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_shrink_of_one_row_keeps_24_kib_of_vh_in_flight(rows: Rows, architecture: int) -> None:
    row = binary(rows, "_lowrank_shrink_kernel", ", 1 rows", architecture)
    assert row["copied_ahead"] >= 24 << 10
    assert row["loads"]["16"] == 4 * 4  # 16 x 256 elements are four copies per thread; four stages
    assert row["shared"] <= 28 << 10  # eight programs fit in a processor
    assert row["registers"] <= 96


@pytest.mark.slow
@pytest.mark.parametrize("case", [", 1 rows", ", 16 rows"])
@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_the_expand_loads_all_of_u_before_it_waits_for_h(rows: Rows, case: str, architecture: int) -> None:
    row = binary(rows, "_lowrank_expand_kernel", case, architecture)
    assert row["prefetched"] >= 32 * 208 * 2  # output features of a program, rank, bytes
    assert row["copied_ahead"] == 0  # there is no loop over the rank
    assert row["registers"] <= 128


@pytest.mark.slow
def test_dependent_launch_starts_with_sm_90(rows: Rows) -> None:
    for kernel in ("_lowrank_shrink_kernel", "_lowrank_expand_kernel"):
        counts = {row["architecture"]: row["dependent_launch"] for row in rows if row["kernel"] == kernel}
        assert counts.pop(80) == 0
        assert all(counts.values())


def representatives() -> list[AotCase]:
    return [case for case in cases() if case.representative]


def test_names_of_cases_are_unique() -> None:
    names = [case.name for case in cases()]
    assert len(names) == len(set(names))


SOUND = Binary(
    90, registers=100, stack=0, local=0, shared=1024, instructions=("LDGSTS.E.BYPASS.128", "HGMMA.64", "STG.E", "EXIT")
)
FAULTS = {
    "stack": (replace(SOUND, stack=24), "spills"),
    "local memory": (replace(SOUND, stack=16, local=8), "spills"),
    "shared": (replace(SOUND, shared=SHARED_LIMITS[90] + 1), "shared memory"),
    "narrow": (replace(SOUND, instructions=(*SOUND.instructions, "LDG.E.U16")), "loads of 2 bytes"),
    "no wide": (replace(SOUND, instructions=("LDG.E.64", "HGMMA.64")), "no 16-byte loads"),
    "no tensor cores": (replace(SOUND, instructions=("LDG.E.128", "FFMA")), "without tensor cores"),
    "old tensor cores": (replace(SOUND, instructions=("LDG.E.128", "HMMA.16816.F32.BF16")), "no HGMMA"),
    "dependent launch": (replace(SOUND, instructions=(*SOUND.instructions, "ACQBULK")), "where there is none"),
}


def gradient_launch() -> Any:
    return next(case for case in representatives() if "token squares" in case.name).launches(CARDS[90])[0]


def test_a_sound_binary_has_no_complaints() -> None:
    assert complaints(gradient_launch(), SOUND) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(fault: str) -> None:
    binary, complaint = FAULTS[fault]
    assert any(complaint in found for found in complaints(gradient_launch(), binary))


@pytest.mark.parametrize(
    ("copies", "complaint"),
    [(16, False), (15, True), (0, True)],  # 0: the loop as Triton compiles it unless it is asked to copy ahead
)
def test_a_loop_that_copies_too_little_ahead_is_found(copies: int, complaint: bool) -> None:
    shrink = next(case for case in representatives() if "pair, 1 rows" in case.name).launches(CARDS[90])[0]
    listing = ("LDG.E.128", *["LDGSTS.E.BYPASS.128"] * copies, "LDGSTS.E", "ACQBULK")
    found = complaints(shrink, replace(SOUND, instructions=listing))
    assert any("copy" in text for text in found) == complaint


WAIT_AND_RELEASE = "ACQBULK PREEXIT LDG.E"
VALID = {  # both with the allocation of tensor memory on sm_100, which uses shared memory
    "shrink": f"ATOMS.OR STS BAR.SYNC UBLKPF.L2 {WAIT_AND_RELEASE}",
    "expand": f"ATOMS.OR STS BAR.SYNC LDG.E.EF.128 {WAIT_AND_RELEASE}",
}
INVALID = {  # kernel, instructions, complaint
    "no wait": ("shrink", "UBLKPF.L2 PREEXIT LDG.E", "is missing"),
    "no release": ("expand", "LDG.E.EF.128 ACQBULK LDG.E", "is missing"),
    "released first": ("shrink", "PREEXIT UBLKPF.L2 ACQBULK LDG.E PREEXIT", "before the wait"),
    "x read first": ("shrink", f"UBLKPF.L2 LDG.E.128 {WAIT_AND_RELEASE}", "memory is used"),
    "Vh copied first": ("shrink", f"UBLKPF.L2 LDGSTS.E.BYPASS.128 {WAIT_AND_RELEASE}", "memory is used"),
    "Vh in registers first": ("shrink", f"UBLKPF.L2 LDG.E.EF.128 {WAIT_AND_RELEASE}", "memory is used"),
    "h read first": ("expand", f"LDG.E.EF.128 LDG.E.STRONG.GPU {WAIT_AND_RELEASE}", "memory is used"),
    "stored first": ("expand", f"LDG.E.EF.128 STG.E {WAIT_AND_RELEASE}", "memory is used"),
    "prefetched late": ("shrink", "ACQBULK PREEXIT UBLKPF.L2 LDG.E", "not prefetched"),
}


def pair(rows: int, architecture: int) -> dict[str, Launch]:
    case = next(case for case in representatives() if f"pair, {rows} rows" in case.name)
    return dict(zip(("shrink", "expand"), case.launches(CARDS[architecture]), strict=True))


def listed(listing: str) -> Binary:
    return replace(SOUND, instructions=tuple(listing.split()))


@pytest.mark.parametrize("kernel", VALID)
def test_a_dependent_launch_waits_then_releases(kernel: str) -> None:
    assert dependent_complaints(pair(1, 90)[kernel], listed(VALID[kernel])) == []
    assert dependent_complaints(pair(1, 80)[kernel], listed("LDG.E.EF.128 STG.E")) == []
    assert dependent_complaints(pair(1, 80)[kernel], listed(VALID[kernel])) != []


@pytest.mark.parametrize("name", INVALID)
def test_an_unsafe_dependent_launch_is_found(name: str) -> None:
    kernel, listing, complaint = INVALID[name]
    assert any(complaint in found for found in dependent_complaints(pair(1, 90)[kernel], listed(listing)))


def test_a_dependent_launch_without_its_option_is_found() -> None:
    for architecture, options in ((90, {}), (80, {"launch_pdl": True})):
        launch = pair(1, architecture)["shrink"]._replace(options=options)
        assert "differ" in dependent_complaints(launch, listed(VALID["shrink"]))[0]


@pytest.mark.parametrize(
    ("early", "complaint"),
    [
        ("LDG.E.EF.128 " * 8, False),
        ("STS BAR.SYNC " + "LDG.E.EF.128 " * 8, False),
        ("LDG.E.EF.128 " * 7, True),
        ("LDG.E.EF.128 STS.128 BAR.SYNC " + "LDG.E.EF.128 " * 7, True),  # the first load is used before the others
    ],
)
def test_an_expand_that_loads_u_late_is_found(early: str, complaint: bool) -> None:
    expand = next(case for case in representatives() if "pair, 1 rows" in case.name).launches(CARDS[90])[1]
    listing = (*early.split(), "ACQBULK", "LDG.E.EF.128")
    assert any("bytes of U" in text for text in complaints(expand, replace(SOUND, instructions=listing))) == complaint


ARRIVE, FETCH, READ = "ATOMG.E.ADD.STRONG.GPU", "LDG.E.EF.128", "LDG.E.STRONG.GPU"
SPIN = f"{READ} CCTL.IVALL"


@pytest.mark.parametrize(
    ("listing", "complaint"),
    [
        (f"{ARRIVE} {FETCH} {SPIN}", None),
        (f"{ARRIVE} {READ} {READ} BAR.SYNC {ARRIVE} {FETCH} {FETCH} {SPIN} {SPIN} {FETCH}", None),
        (f"{FETCH} {ARRIVE} {SPIN}", "not fetched between"),
        (f"{ARRIVE} {SPIN} {FETCH}", "not fetched between"),
        (f"{ARRIVE} {FETCH} {READ} {ARRIVE} {SPIN}", "not fetched between"),
        (f"{FETCH} {SPIN}", "barrier"),
        (f"{ARRIVE} {FETCH} {READ}", "barrier"),
    ],
)
def test_the_barrier_is_arrive_fetch_spin(listing: str, complaint: str | None) -> None:
    found = barrier_complaints(replace(SOUND, instructions=tuple(listing.split())))
    assert (not found) if complaint is None else complaint in found[0]
