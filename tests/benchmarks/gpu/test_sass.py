from __future__ import annotations

import pytest

sass = pytest.importorskip("benchmarks.gpu.sass", reason="Triton is not importable")

LISTING = """
	code for sm_90
		Function : kernel
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                       /* 0x00000a00ff017b82 */
                                                                               /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.EF.128 R4, desc[UR4][R2.64] ;          /* 0x0000000402048981 */
        /*0020*/             @!UP1 UMOV UR4, 0x400 ;                            /* 0x0000040000047882 */
        /*0030*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ; /* 0x0000000402097fae */
        /*0040*/               @P2 LDG.E.U16 R8, desc[UR4][R6.64] ;             /* 0x0000000406088981 */
        /*0050*/                   LDG.E R8, desc[UR4][R6.64] ;                 /* 0x0000000406088981 */
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*12a0*/                   EXIT ;
"""
RESOURCES = "Function kernel:\n  REG:170 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[0]:648 TEXTURE:0 SURFACE:0 SAMPLER:0"


def test_instructions_are_read_in_order_without_their_predicates() -> None:
    binary = sass.read(90, RESOURCES, LISTING, shared=512)
    assert binary.instructions == (
        "LDC",
        "LDG.E.EF.128",
        "UMOV",
        "LDGSTS.E.BYPASS.128",
        "LDG.E.U16",
        "LDG.E",
        "HGMMA.64",
        "EXIT",
    )
    assert binary.count("HGMMA") == 1


def test_resources_are_read() -> None:
    binary = sass.read(90, RESOURCES, LISTING, shared=512)
    assert (binary.registers, binary.stack, binary.local, binary.shared) == (170, 8, 4, 512)


def test_loads_are_counted_by_bytes_per_thread() -> None:
    assert sass.read(90, RESOURCES, LISTING, shared=0).loads() == {16: 2, 4: 1, 2: 1}


@pytest.mark.parametrize(
    ("mnemonic", "width"),
    [
        ("LDG.E.U8", 1),
        ("LDG.E.S16", 2),
        ("LDG.E", 4),
        ("LDG.E.64", 8),
        ("LDG.E.128.CONSTANT", 16),
        ("LDG.E.ENL2.256", 32),
    ],
)
def test_widths_of_loads(mnemonic: str, width: int) -> None:
    assert sass.load_width(mnemonic) == width


def test_a_report_without_resources_is_refused() -> None:
    with pytest.raises(ValueError, match="REG, STACK, SHARED"):
        sass.read(90, "", LISTING, shared=0)
