"""What the report reads from machine code of NVIDIA and AMD GPUs, and the occupancy that follows."""

import dataclasses
from collections import Counter

import pytest

from tools.report import amdgcn, flow, occupancy, rows, sass

# ---- NVIDIA machine code

# A kernel with an outer and an inner loop, in the form that ptxas writes. The inner loop is left through a call that
# never returns. The slow path of a wait stands behind the end of the code and branches back, which must not be taken
# for a loop over all the code between.
CODE = """
	.target	sm_{arch}

	.section	.text.kernel,"ax",@progbits
kernel:
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   BSSY B0, `(.L_x_1) ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
        /*0030*/                   LDG.E.128 R4, [R2.64] ;
        /*0040*/                   BSYNC B0 ;
.L_x_0:
        /*0050*/                   LDG.E R8, [R2.64] ;
.L_x_1:
        /*0060*/                   STL [R1], R8 ;
.L_x_2:
        /*0070*/                   LDGSTS.E.BYPASS.LTC128B.128 [R0], [R4.64] ;
        /*0080*/                   LDGSTS.E.LTC128B [R0], [R4.64] ;
{body}        /*0ff0*/               @P1 CALL.REL.NOINC `(.L_x_3) ;
        /*1000*/                   BRA `(.L_x_2);
.L_x_3:
        /*1010*/                   STG.E.128 [R4.64], R8 ;
        /*1020*/                   STG.E.U16 [R4.64], R8 ;
        /*1030*/                   BRA.U !UP2, `(.L_x_1) ;
        /*1040*/                   UTMALDG.2D [UR4], [UR6] ;
        /*1050*/                   RED.E.ADD.F32 [R4.64], R8 ;
        /*1060*/                   EXIT ;
        /*1070*/                   BRA `(.L_x_3) ;
.L_x_4:
        /*1080*/                   BRA `(.L_x_4);
        /*1090*/                   NOP;
.L_x_5:
"""
USAGE = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function kernel:
  REG:168 STACK:16 SHARED:1536 LOCAL:0 CONSTANT[0]:416 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
BODY = [
    "HMMA.16816.F32.BF16 R8, R4, R6, R8",
    "MUFU.EX2 R3, R3",
    "FFMA R3, R3, R4, R5",
    "SHFL.BFLY PT, R3, R3, 0x2, 0x1f",
]


def _sass(arch=80):
    body = "".join(f"        /*{0x90 + 16 * i:04x}*/                   {line} ;\n" for i, line in enumerate(BODY * 4))
    return sass.parse(CODE.replace("{arch}", str(arch)).replace("{body}", body), USAGE)["kernel"]


def test_sass_resources_and_counts():
    kernel = _sass()
    assert (kernel.registers, kernel.stack, kernel.shared_memory) == (168, 16, 1536)
    counts = sass.counts(instruction.opcode for instruction in kernel.instructions)
    expected = {
        "tensor HMMA": 4, "exp": 4, "fp32": 4, "shuffles": 4, "spills": 1, "loads": 2, "loads wide": 1, "stores": 2,
        "stores wide": 1, "async copies": 2, "async copies wide": 1, "bulk copies": 1, "atomics": 1,
    }  # fmt: skip
    assert {name: counts[name] for name in expected} == expected
    assert counts["instructions"] == len(kernel.instructions) - 1  # the NOP that pads the code does not count


def test_sass_of_newer_architectures_counts_the_reserved_kilobyte():
    assert _sass("90a").shared_memory == 512


def test_main_loop_is_the_innermost_and_no_artefact_of_the_layout():
    instructions = _sass().instructions
    loop = flow.main_loop(instructions, lambda opcodes: sum("HMMA" in opcode for opcode in opcodes))
    assert len(loop) == 2 + 4 * len(BODY) + 2 and Counter(loop)["HMMA.16816.F32.BF16"] == 4
    assert loop[0].startswith("LDGSTS") and loop[-1] == "BRA"


def test_straight_code_has_no_loop():
    assert flow.main_loop([flow.Instruction("FADD")] * 40, len) is None
    waiting = [flow.Instruction("SYNCS"), flow.Instruction("BRA", (0, 2)), flow.Instruction("EXIT", ())]
    assert flow.main_loop(waiting, len) is None


@pytest.mark.parametrize(
    "opcode, kind, work",
    [
        ("HMMA.16816.F32.BF16", "HMMA", ("HMMA 16", 16 * 8 * 16 * 2)),
        ("HMMA.16816.F32", "HMMA", ("HMMA 16", 16 * 8 * 16 * 2)),  # fp16
        ("HMMA.1688.F32.TF32", "HMMA", ("HMMA tf32", 16 * 8 * 8 * 2)),
        ("HGMMA.64x128x16.F32.BF16", "HGMMA", ("HGMMA 16", 64 * 128 * 16 * 2 // 4)),
        ("UTCHMMA", "UTCHMMA", None),  # its text does not say how large it is
        ("FFMA", None, None),
        ("REDUX", None, None),
    ],
)
def test_tensor_instructions(opcode, kind, work):
    assert sass.tensor_kind(opcode) == kind
    assert sass.tensor_work(opcode) == work


def test_products_in_tf32_are_seen():
    assert sass.counts(["HMMA.1688.F32.TF32", "HMMA.16816.F32.BF16", "FFMA"])["rounded fp32"] == 1
    assert amdgcn.counts(["v_mfma_f32_16x16x8_xf32", "v_mfma_f32_32x32x2_f32"])["rounded fp32"] == 1


def test_a_cache_hint_is_not_taken_for_the_width_of_an_access():
    wide = ("LDG.E.128", "LDGSTS.E.BYPASS.LTC128B.128", "LDG.E.ENL2.256", "STG.E.EF.128")
    narrow = ("LDGSTS.E.LTC128B", "LDG.E.LTC128B.64", "LDG.E", "STG.E.U16")
    assert all(map(sass.is_wide, wide)) and not any(map(sass.is_wide, narrow))


def test_code_behind_a_call_that_never_returns_is_reached():
    body = [flow.Instruction("IADD3")] * 20
    first = [*body, flow.Instruction("CALL", (22, 21)), flow.Instruction("BRA", (0,))]
    second = [*[flow.Instruction("HMMA")] * 20, flow.Instruction("BRA", (22, 43)), flow.Instruction("EXIT", ())]
    loop = flow.main_loop([*first, *second], lambda opcodes: opcodes.count("HMMA"))
    assert Counter(loop) == {"HMMA": 20, "BRA": 1}


def _loop(parts: list, first: int) -> list[flow.Instruction]:
    """A loop at position `first` of a kernel. A part is (opcode, number), or a list, which is an inner loop."""
    code: list[flow.Instruction] = []
    for part in parts:
        code += _loop(part, first + len(code)) if isinstance(part, list) else [flow.Instruction(part[0])] * part[1]
    return [*code, flow.Instruction("BRA", (first, first + len(code) + 1))]


def _kernel(*loops: list) -> list[flow.Instruction]:
    """A kernel of these loops, one after another."""
    return [*_loop([*loops], 0)[:-1], flow.Instruction("EXIT", ())]


def _products(opcodes) -> int:
    return opcodes.count("HMMA")


def test_a_small_inner_loop_does_not_hide_the_outer_one_that_carries_the_products():
    small = [("IADD3", 19)]
    loop = flow.main_loop(_kernel([("HMMA", 32), small, ("FADD", 30)]), _products)
    assert Counter(loop) == {"HMMA": 32, "IADD3": 19, "FADD": 30, "BRA": 2}


def test_a_small_inner_loop_does_not_hide_a_large_outer_one_without_products():
    small = [("IADD3", 19)]
    loop = flow.main_loop(_kernel([("FFMA", 881), small]), _products)
    assert Counter(loop) == {"FFMA": 881, "IADD3": 19, "BRA": 2}


def test_a_heavy_inner_loop_comes_before_the_light_loop_around_it():
    heavy = [("HMMA", 16), ("FADD", 10)]
    loop = flow.main_loop(_kernel([("IADD3", 40), heavy, ("STG", 200)]), _products)
    assert Counter(loop) == {"HMMA": 16, "FADD": 10, "BRA": 1}
    # The outer one may have more instructions, since the inner one repeats its own.
    loop = flow.main_loop(_kernel([("IADD3", 100), [("FFMA", 80)]]), _products)
    assert Counter(loop) == {"FFMA": 80, "BRA": 1}
    # Products before the inner loop do not change that.
    loop = flow.main_loop(_kernel([("HMMA", 32), heavy]), _products)
    assert Counter(loop) == {"HMMA": 16, "FADD": 10, "BRA": 1}


@pytest.mark.parametrize("heavier", [0, 1])
def test_of_two_siblings_the_heavier_loop_is_the_main_one(heavier):
    light, heavy = [("HMMA", 8), ("FADD", 90)], [("HMMA", 9), ("FADD", 9)]
    siblings = (heavy, light) if heavier == 0 else (light, heavy)
    expected = {"HMMA": 9, "FADD": 9, "BRA": 1}
    assert Counter(flow.main_loop(_kernel(*siblings), _products)) == expected
    assert Counter(flow.main_loop(_kernel([("IADD3", 50), *siblings]), _products)) == expected
    without = ([("FADD", 30)], [("FMUL", 29)])
    assert Counter(flow.main_loop(_kernel(*without[:: 1 - 2 * heavier]), _products)) == {"FADD": 30, "BRA": 1}


def test_work_of_inner_loops_is_not_counted_as_that_of_the_loop_around_them():
    inner = [[("HMMA", 8), ("FADD", 9 + i)] for i in range(10)]
    loop = flow.main_loop(_kernel([("IADD3", 50), *inner]), _products)
    assert Counter(loop) == {"HMMA": 8, "FADD": 18, "BRA": 1}


def test_products_of_unknown_size_weigh_more_than_none():
    """UTCHMMA does not state its FLOP. With none, a longer loop without products would be the main one on sm_100."""
    code = _kernel([("UTCHMMA", 2), ("IADD3", 20)], [("IADD3", 60)])
    function = sass.Function(registers=64, stack=0, shared_memory=0, instructions=tuple(code))
    assert rows.loop_of("sm_100", sass, function).counts["tensor UTCHMMA"] == 2


def test_failing_tool_says_why(tmp_path):
    tool = tmp_path / "nvdisasm"
    tool.write_text("#!/bin/sh\necho 'not an ELF file' >&2\nexit 255\n")
    tool.chmod(0o755)
    with pytest.raises(RuntimeError, match="exit status 255: not an ELF file"):
        sass.read(b"", str(tool), str(tool))


# ---- AMD assembly

AMDGCN = """
kernel:                                 ; @kernel
; %bb.0:
	s_load_dwordx4 s[0:3], s[0:1], 0x0
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	global_load_dword v5, v6, s[2:3]
.LBB0_1:                                ; %loop
{body}	s_cbranch_scc1 .LBB0_1
; %bb.2:
	buffer_store_dwordx2 v[0:1], v4, s[0:3], 0 offen
	ds_bpermute_b32 v1, v2, v3
	s_endpgm
.Lfunc_end0:
amdhsa.kernels:
  - .agpr_count:     16
    .args:
      - .offset:         0
        .size:           8
    .group_segment_fixed_size: 512
    .name:           kernel
    .private_segment_fixed_size: 8
    .sgpr_count:     97
    .sgpr_spill_count: 1
    .symbol:         kernel.kd
    .vgpr_count:     226
    .vgpr_spill_count: 2
    .wavefront_size: 64
amdhsa.target:   amdgcn-amd-amdhsa--gfx942
"""


def _amdgcn():
    body = ["v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]", "v_exp_f32_e32 v1, v1", "v_add_f32 v1, v1, v2"]
    return AMDGCN.replace("{body}", "".join(f"\t{line}\n" for line in body * 8))


def test_amdgcn():
    kernel = amdgcn.parse(_amdgcn(), "kernel")
    figures = dataclasses.asdict(kernel)
    del figures["instructions"]
    assert figures == {
        "vgprs": 226, "agprs": 16, "sgprs": 97, "vgpr_spills": 2, "sgpr_spills": 1, "scratch": 8, "shared_memory": 512,
    }  # fmt: skip
    counts = amdgcn.counts(instruction.opcode for instruction in kernel.instructions)
    expected = {
        "tensor MFMA": 8, "vector": 16, "exp": 8, "loads": 2, "loads wide": 1, "stores": 1, "stores wide": 0,
        "shuffles": 1,
    }  # fmt: skip
    assert {name: counts[name] for name in expected} == expected
    loop = flow.main_loop(kernel.instructions, len)
    assert len(loop) == 8 * 3 + 1
    with pytest.raises(ValueError, match="expected one that the assembly defines, got 'other'"):
        amdgcn.parse(_amdgcn(), "other")


@pytest.mark.parametrize(
    "opcode, work",
    [
        ("v_mfma_f32_32x32x8_bf16", ("MFMA 16", 32 * 32 * 8 * 2)),
        ("v_mfma_f32_32x32x8bf16_1k", ("MFMA 16", 32 * 32 * 8 * 2)),
        ("v_mfma_f32_16x16x16_f16", ("MFMA 16", 16 * 16 * 16 * 2)),
        ("v_mfma_f32_32x32x2f32", ("MFMA f32", 32 * 32 * 2 * 2)),
        ("v_mfma_f32_32x32x2_f32", ("MFMA f32", 32 * 32 * 2 * 2)),
        ("v_mfma_f32_32x32x4_2b_f16", ("MFMA 16", 32 * 32 * 4 * 2 * 2)),
        ("v_fma_f32", None),
    ],
)
def test_matrix_instructions_of_amd(opcode, work):
    assert amdgcn.tensor_work(opcode) == work


# ---- Occupancy


# Blocks per multiprocessor as cuda_occupancy.h of CUDA 13.0 computes them.
@pytest.mark.parametrize(
    "target, threads, registers, shared, blocks, share",
    [
        ("sm_80", 128, 40, 0, 12, 0.75),
        ("sm_80", 96, 128, 0, 5, 15 / 64),  # registers are handed out in each of four partitions
        ("sm_80", 128, 168, 40960, 3, 0.1875),
        ("sm_80", 128, 128, 40960, 4, 0.25),
        ("sm_86", 128, 128, 40960, 2, 8 / 48),
        ("sm_86", 96, 40, 0, 16, 1.0),
        ("sm_80", 256, 255, 100000, 1, 0.125),
        ("sm_90", 32, 16, 0, 32, 0.5),
        ("sm_120", 32, 16, 0, 24, 0.5),
    ],
)
def test_nvidia_occupancy(target, threads, registers, shared, blocks, share):
    found = occupancy.nvidia(target, registers=registers, threads=threads, shared_memory=shared)
    assert (found.blocks, found.share) == (blocks, pytest.approx(share))


def test_tensor_memory_limits_occupancy():
    found = occupancy.nvidia("sm_100", registers=64, threads=128, shared_memory=1024, tensor_columns=256)
    assert (found.blocks, found.limit) == (2, "tensor memory")


# Waves per SIMD as LLVM writes them behind its assembly ("; Occupancy: "), with 4 waves per work group.
@pytest.mark.parametrize("vgprs, sgprs, waves", [(226, 97, 2), (64, 96, 8), (72, 96, 7), (128, 96, 4), (64, 104, 7)])
def test_amd_occupancy(vgprs, sgprs, waves):
    found = occupancy.amd("gfx942", vgprs=vgprs, sgprs=sgprs, threads=256, shared_memory=0)
    assert (found.blocks, found.share) == (waves, waves / 8)
    limited = occupancy.amd("gfx942", vgprs=vgprs, sgprs=sgprs, threads=256, shared_memory=64 << 10)
    assert (limited.blocks, limited.limit) == (1, "LDS")
