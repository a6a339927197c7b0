from __future__ import annotations

import pytest

from grasp_kernels import cuda
from tests.ops.cuda_cases import small
from tests.ops.cuda_emulator import DEPENDENT, STREAM, Emulator, kinds
from tests.ops.linears import check_linears


@pytest.mark.parametrize(("capability", "attribute"), [(80, 0), (89, 0), (90, DEPENDENT), (120, DEPENDENT)])
def test_auto_is_the_pair_and_dependent_if_the_card_can(emulator: Emulator, capability: int, attribute: int) -> None:
    emulator.configure(capability=capability)
    cuda.run(*small())
    launches = emulator.finish()
    assert kinds(launches) == [("shrink", 0), ("expand", attribute)]
    assert {launch.stream for launch in launches} == {STREAM}


def test_a_path_that_the_card_cannot_run_is_refused(emulator: Emulator) -> None:
    emulator.configure(capability=80)
    with pytest.raises(RuntimeError, match=r"dependent launches need compute capability 9\.0, this card has 8\.0"):
        cuda.run(*small(), path="dependent")
    emulator.configure(capability=75)
    with pytest.raises(RuntimeError, match=r"this card has compute capability 7\.5, the kernels need 8\.0"):
        cuda.run(*small())
    assert emulator.finish() == []


@pytest.mark.parametrize(
    ("function", "call", "path"),
    [
        ("cudaGetDevice", "cudaGetDevice", "auto"),
        ("cudaDeviceGetAttribute", "cudaDeviceGetAttribute", "auto"),
        ("cudaFuncGetAttributes", "cudaFuncGetAttributes", "auto"),
        ("cudaLaunchKernelExC", "launch of lowrank_shrink_kernel", "auto"),
        ("cudaLaunchKernelExC", "launch of lowrank_cooperative_kernel", "cooperative"),
        (
            "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
            "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
            "cooperative",
        ),
    ],
)
def test_an_error_of_cuda_is_an_exception_with_its_message(
    emulator: Emulator, function: str, call: str, path: str
) -> None:
    emulator.configure(failing=function, error=100)
    with pytest.raises(RuntimeError, match=rf"^{call}: no device \(cudaErrorNoDevice\)$"):
        cuda.run(*small(), path=path)
    emulator.configure()
    x, groups = small()
    outputs = cuda.run(x, groups, path=path)
    emulator.finish()
    check_linears(outputs, x, groups)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 17}, "x must have at most 16 rows, got 17"),
        ({"rows": -1}, "x must have at most 16 rows, got -1"),
        ({"K": 0}, "1 <= K <= 2"),
        ({"data": 0}, "got K 64"),
        ({"rows": 2, "stride": -1}, "stride -1"),
        ({"dtype": 3}, "dtype must be a grasp_dtype, got 3"),
        ({"groups": ()}, "x, groups and options must be there"),
        ({"groups": ((1, 2, 3),)}, "a group is a tuple of 19"),
        ({"N": 0}, "got N 0 and R 16"),
        ({"R": 1 << 28}, "got N 40 and R 268435456"),
        ({"U": 0}, "U, Vh and y must not be null"),
        ({"U_stride": -1}, "strides must not be negative"),
        ({"rows": 2, "y_stride": 39}, "nor that of y below N"),
        ({"s": 16, "s_dtype": 1}, "s must be float32 or of dtype 2, got 1"),
        ({"s": 16, "order": 4}, "with order, s must be null and N at least R, got s 0x10, N 40 and R 16"),
        ({"N": 15, "order": 4}, "with order, s must be null and N at least R, got s .*, N 15 and R 16"),
        ({"U_bits": 2}, "U must have 8 or 4 bits and 0, 32, 64 or 128 columns per scale, got 2 and 0"),
        ({"Vh_bits": 4, "Vh_group": 48}, "Vh must have 8 or 4 bits and 0, 32, 64 or 128 .*, got 4 and 48"),
        ({"U_bits": 8}, "the scales of U must be there, in float32 or dtype 2; got"),
        ({"Vh_bits": 8, "Vh_scales": 16, "scales_dtype": 1}, "the scales of Vh must be .* got 0x10 in 1"),
        ({"Vh_bits": 8, "Vh_scales": 16, "s": 16}, "s must be null if Vh is quantised, got 0x10"),
        ({"workspace": 0}, "the workspace must be aligned to 16 and have 512 bytes"),
        ({"workspace": 8}, "the workspace must be aligned to 16"),
        ({"workspace_bytes": 511}, "have 512 bytes, got 511"),
        ({"path": 3}, "the cooperative kernel needs a barrier"),
        ({"path": 4}, "path must be a grasp_cuda_path and splits at least 0, got 4 and 0"),
        ({"splits": -1}, "got 0 and -1"),
    ],
    ids=str,
)
def test_the_module_refuses_invalid_arguments(emulator: Emulator, change: dict[str, object], message: str) -> None:
    group = {"U": 16, "s": 0, "Vh": 16, "bias": 0, "y": 16, "U_stride": 16, "Vh_stride": 64, "y_stride": 40}
    group |= {"N": 40, "R": 16, "s_dtype": 0, "order": 0, "U_scales": 0, "Vh_scales": 0, "scales_dtype": 0}
    group |= {"U_bits": 0, "Vh_bits": 0, "U_group": 0, "Vh_group": 0}
    call = {"data": 16, "stride": 64, "rows": 1, "K": 64, "dtype": 2, "groups": None}
    call |= {"stream": 0, "workspace": 16, "workspace_bytes": 512, "barrier": 0, "path": 0, "splits": 0}
    group = {name: change.get(name, value) for name, value in group.items()}
    call = {name: change.get(name, value) for name, value in call.items()}
    if call["groups"] is None:
        call["groups"] = (tuple(group.values()),)
    with pytest.raises(ValueError, match=message):
        emulator.run(*call.values())
    assert emulator.finish() == []
