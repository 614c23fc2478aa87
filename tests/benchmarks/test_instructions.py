"""Instructions counted in machine code: a walk through a few lines of it."""

import struct
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import instructions
import sass

# int64 n and int kind are the arguments: do { kind ? 3 instructions : 2 } while (++i < n)
LOOP = """
.text.kernel:
        .type           kernel,@function
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   CS2R R2, SRZ ;
        /*0020*/                   ULDC.64 UR4, c[0x0][0x210] ;
.L_x_0:
        /*0030*/                   ISETP.NE.AND P1, PT, RZ, c[0x0][0x218], PT ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   LDG.E R8, desc[UR8][R6.64] ;
        /*0060*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0070*/               @P1 FADD R8, R8.reuse, 1 ;
        /*0080*/              @!P1 FADD R8, R8, 2 ;
        /*0090*/                   FADD R8, R8, 3 ;
.L_x_2:
        /*00a0*/                   IADD3 R2, P0, R2, 0x1, RZ ;
        /*00b0*/                   IADD3.X R3, RZ, R3, RZ, P0, !PT ;
        /*00c0*/                   ISETP.GE.U32.AND P0, PT, R2, UR4, PT ;
        /*00d0*/                   ISETP.GE.AND.EX P0, PT, R3, UR5, PT, P0 ;
        /*00e0*/              @!P0 BRA `(.L_x_0) ;
        /*00f0*/                   EXIT ;
.L_x_3:
        /*0100*/                   BRA `(.L_x_3);
"""


def code(*lines):
    return sass.parse("\n".join(f"        /*0000*/  {line} ;" for line in (*lines, "EXIT")))


def registers(*lines):
    thread = sass._Thread(code(*lines), b"")
    thread.run()
    return thread


@pytest.mark.parametrize(("kind", "a_turn"), [(0, 9), (1, 10)])
@pytest.mark.parametrize("turns", [1, 2, 7])
def test_loops_and_branches_are_those_of_the_arguments(kind, a_turn, turns):
    functions = sass.sections(LOOP)
    assert list(functions) == ["kernel"]
    parsed = sass.parse(functions["kernel"])
    assert len(parsed.instructions) == 17
    assert sass.executed(parsed, struct.pack("qi", turns, kind)) == 3 + a_turn * turns + 1


def test_a_branch_that_depends_on_a_float_is_an_error():
    lines = "FSETP.GT.AND P0, PT, R4, R5, PT", "@P0 BRA `(.L_x_0)"
    with pytest.raises(sass.Unknown, match="BRA"):
        sass.executed(code(*lines), b"")


def test_what_an_instruction_of_no_known_result_writes_is_unknown():
    thread = registers("MOV R4, 0x1", "MOV R5, 0x1", "MOV R6, 0x1", "DADD R4, R8, R10")
    assert [thread.value(name) for name in ("R4", "R5", "R6")] == [None, None, 1]
    thread = registers("MOV R4, 0x1", "FSETP.GT.AND P0, PT, R6, R7, PT", "@P0 MOV R4, 0x2")
    assert thread.value("R4") is None


def test_single_bits_of_a_word_are_known():
    thread = registers(
        *("FADD R4, R5, R6", "LOP3.LUT R4, R4, 0xfffffffe, RZ, 0xc0, !PT"),
        *("LOP3.LUT P0, RZ, R4, 0x1, RZ, 0xc0, !PT", "LOP3.LUT P1, RZ, R4, 0x2, RZ, 0xc0, !PT"),
        *("LOP3.LUT R4, R4, 0x8, RZ, 0xfc, !PT", "LOP3.LUT P2, RZ, R4, 0xa, RZ, 0xc0, !PT"),
        *("PRMT R5, RZ, 0x7610, R4", "LOP3.LUT P3, RZ, R5, 0xff, RZ, 0xc0, !PT"),
    )
    assert [thread.predicate(f"P{i}") for i in range(4)] == [False, None, True, False]
    assert thread.value("R4") is None


@pytest.mark.parametrize(
    ("line", "low", "high"),
    [
        ("IADD3 R8, P0, R4, -R5, RZ", 2**32 - 2, 0),  # 3 - 5: nothing is carried
        ("IADD3 R8, R5, ~R4, RZ", 1, 0),
        ("IMAD.WIDE R8, R6, 0x3, R4", 0, 5),  # -1 * 3 + (5 : 3)
        ("IMAD.WIDE.U32 R8, R6, R6, RZ", 1, 2**32 - 2),
        ("IMAD.HI.U32 R8, R6, R6, RZ", 2**32 - 2, 0),
        ("LEA R8, R5, R4, 0x4", 83, 0),
        ("LEA.HI R8, R6, R4, RZ, 0x4", 18, 0),
        ("SHF.L.U64.HI R8, R6, 0x4, R5", 0x5F, 0),
        ("SHF.R.S32.HI R8, RZ, 0x1f, R6", 2**32 - 1, 0),
        ("SHF.R.U64 R8, R4, 0x1, R5", 0x80000001, 0),
        ("LOP3.LUT R8, R4, R5, RZ, 0x3c, !PT", 6, 0),  # xor
        ("SEL R8, R4, R5, !PT", 5, 0),
        ("HFMA2.MMA R8, -RZ, RZ, 1.875, 0", 0x3F800000, 0),
        ("P2R R8, PR, RZ, 0x1", 1, 0),
    ],
)
def test_integers(line, low, high):
    start = "MOV R4, 0x3", "MOV R5, 0x5", "MOV R6, 0xffffffff", "CS2R R8, SRZ"
    thread = registers(*start, "ISETP.NE.AND P0, PT, R4, R5, PT", line)
    assert (thread.value("R8"), thread.value("R9")) == (low, high)


def test_arguments_divide_as_the_kernels_do():
    for divisor in (2, 3, 7, 512, 1000):
        magic, shift = instructions.divider(divisor)
        for n in (0, 1, divisor - 1, divisor, 10**12 + 1):
            assert (n * magic >> 64 + shift) == n // divisor


def test_every_row_has_two_kernels_of_its_own():
    symbols = [(each.source, each.symbol) for row in instructions.rows() for each in row.kernels]
    assert len(symbols) == len(set(symbols)) == 32
