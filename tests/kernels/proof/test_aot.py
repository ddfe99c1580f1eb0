"""Compilation ahead of time on the tiny kernels (extra ``aot``), and how its reports are read (no extra)."""

import dataclasses
import json
import os

import jax.numpy as jnp
import pytest

from experiments.bench import kernels_aot
from experiments.tables import kernels as tables
from pallas_kernels.proof.aot import Compilation, Job, compile_jobs
from pallas_kernels.proof.ptxas import Kernel, mosaic_kernels, triton_kernels
from pallas_kernels.proof.sass import Loops, loops, mix
from tests.kernels.proof import scaled

REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to reasons
ptxas info    : Compiling entry function 'forward_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for forward_mosaic_gpu_kernel
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 1 bytes smem
"""
# A loop within a loop, whose wait is spun on out of line, and a loop of another warp.
LISTING = """
        /*0000*/   LDC R1, c[0x0][0x28] ;
        /*0010*/   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR28], RZ, !UPT ;
        /*0020*/   @P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0030*/   STL [R1], R2 ;
.L_x_2:
        /*0040*/   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R2 ;
        /*0050*/   @!P1 BRA `(.L_x_7) ;
.L_x_3:
        /*0060*/   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR28], R24 ;
        /*0070*/   LDL R3, [R1] ;
        /*0080*/   IGMMA.64x128x32.S8.S8 R24, gdesc[UR28], R24 ;
        /*0090*/   @P2 BRA `(.L_x_2) ;
        /*00a0*/   BRA.U UP3, `(.L_x_1) ;
        /*00b0*/   EXIT ;
.L_x_9:
        /*00c0*/   @UP0 UTMALDG.2D [UR24], [UR28] ;
        /*00d0*/   @P2 BRA `(.L_x_9) ;
        /*00e0*/   UTMASTG.2D [UR24], [UR28] ;
        /*00f0*/   EXIT ;
.L_x_7:
        /*0100*/   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R2 ;
        /*0110*/   @!P1 BRA `(.L_x_7) ;
        /*0120*/   BRA `(.L_x_3) ;
.L_x_8:
        /*0130*/   BRA `(.L_x_8) ;
"""
LOG = "gpu.launch async [%0] threads(%a) dynamic_shared_memory_size %c24592_i32 {"


def test_the_report_of_the_assembler_is_read(tmp_path):
    (tmp_path / "forward_0.ptxas").write_text(REPORT)
    (tmp_path / "forward_0.ptx").write_text(
        ".maxntid 384, 1, 1\nwgmma.mma_async.sync;\nwgmma.mma_async.sync;\ncp.async.bulk.tensor.3d\n"
        "mov.b32 \t%r66, 64;\nmbarrier.arrive.expect_tx.shared.b64 %rd22, [%rd20+155648], %r66;\n"
        "@%p4 mbarrier.arrive.expect_tx.shared.b64 _, [%rd20], 512;\n"
        "mov.b32 \t%r7, 64;\nmbarrier.arrive.expect_tx.shared.b64 %rd3, [%rd20+155648], %r7;\n"
    )
    (tmp_path / "forward_0.mlir-passes.log").write_text(LOG)
    (kernel,) = mosaic_kernels(tmp_path)
    assert dataclasses.astuple(kernel)[:7] == ("forward", 168, 20, 24592, 2, 1, 384)
    assert "serialized" in kernel.notes[0]
    # 64 bytes of each of 128 threads, and 512 of a single one.
    assert kernel.tile_bytes == (8192, 512) and kernel.loops is None
    (tmp_path / "forward_0.sass_ctrl").write_text(LISTING)
    (kernel,) = mosaic_kernels(tmp_path)
    assert kernel.loops == Loops(wgmma=2, tma=1, spills=1)
    (tmp_path / "forward_0.ptxas").write_text("nothing")
    with pytest.raises(ValueError, match="no report"):
        mosaic_kernels(tmp_path)


@pytest.mark.parametrize(
    "registers, shared, threads, blocks",
    [
        (168, 1024, 384, 1),  # registers: 12 of the 12 warps that fit
        (255, 1024, 128, 2),  # registers: two warps in each quarter
        (26, 0, 128, 16),  # threads, of which 2,048 fit
        (32, 0, 32, 16),  # a lone warp takes the registers of four
        (32, 100 * 1024, 128, 2),  # shared memory
        (32, 114 * 1024, 128, 1),  # and 1 KiB more for the system
        (32, None, 128, None),
    ],
)
def test_blocks_of_a_multiprocessor(registers, shared, threads, blocks):
    assert Kernel("a", registers, 0, shared, 0, 0, threads).blocks_per_sm() == blocks


def test_a_listing_without_instructions_is_refused():
    with pytest.raises(ValueError, match="no listing"):
        loops("nvdisasm: error")
    with pytest.raises(ValueError, match="no listing"):
        mix("nvdisasm: error")
    with pytest.raises(ValueError, match="no loop holds a tensor core instruction"):
        mix("        /*0000*/   EXIT ;")


def test_the_mix_of_a_loop_is_counted_by_name():
    """Of the inner loop alone: its own blocks, and the wait that is spun on out of line and jumps back into it."""
    found = mix(LISTING)
    assert found.counts == {
        "SYNCS.PHASECHK.TRANS64.TRYWAIT": 2,
        "BRA": 4,
        "HGMMA.64x128x16.F32.BF16": 1,
        "LDL": 1,
        "IGMMA.64x128x32.S8.S8": 1,
    }
    assert found.total == 9 and found.products == 64 * 128 * (16 + 32)
    assert (found.of("SYNCS", "LDL"), found.of("SYNC"), found.of("IGMMA.64x128x32")) == (3, 0, 1)


def test_a_triton_kernel_without_ptx_has_no_figures_but_a_reason(tmp_path):
    line = "001: kCustomKernel [source | sink] gather grid: [2, 1, 1] threads: [128, 1, 1]  shared_memory: 64 bytes\n"
    (tmp_path / "m.thunk_sequence.txt").write_text(line + line.replace("gather", "loop_fusion"))
    (kernel,) = triton_kernels(tmp_path, {"gather"})
    assert (kernel.registers, kernel.shared_bytes) == (None, 64) and "no PTX" in kernel.notes[0]


def test_what_counts_as_a_regression():
    case = dataclasses.replace(scaled.CASES[0], registers=100, spill_bytes=8)
    good = Kernel("a", 100, 8, 0, 0, 0)

    def faults(*kernels, error=None):
        return Compilation("o", "c", "mosaic_gpu", "0", error, kernels=kernels).faults(case)

    assert faults(good) == []
    assert faults(good, dataclasses.replace(good, registers=101)) == [
        "a takes 101 registers, 100 are allowed"
    ]
    assert faults(dataclasses.replace(good, spill_bytes=9)) == ["a spills 9 bytes, 8 are allowed"]
    assert faults() == ["no kernel of mosaic_gpu in the program"]
    assert faults(good, error="no") == ["no"]


def test_the_table_shows_two_figures_where_versions_differ():
    def result(jax, registers, error=None):
        kernels = (
            (Kernel("forward", registers, 0, 2048, 4, 2, 128, (8192, 512), Loops(12, 3, 1)),)
            if error is None
            else ()
        )
        done = Compilation("attention", "8B", "mosaic_gpu", jax, error, kernels=kernels)
        return kernels_aot.row(done, scaled.CASES[0])

    data = {"target": "sm_90a", "missing": {"0.12.0": "no Python 3.13 here"}}
    text = tables.kernels_aot({**data, "results": [result("0.10.2", 168), result("0.11.2", 160)]})
    assert "| forward | 168 / 160 | 0 | 2 | 12 | 3 | 1 | 128 | 3 | 8,192, 512 |" in text
    assert "jax 0.12.0 was left out: no Python 3.13 here." in text
    text = tables.kernels_aot({**data, "results": [result("0.10.2", 1, "boom")]})
    assert "does not compile" in text


def test_a_kernel_in_place_has_one_line_whatever_jax_calls_it():
    def result(jax, name):
        done = Compilation("ssd.step", "8B", "mosaic_gpu", jax, kernels=(Kernel(name, 109, 0, 0, 0, 0),))
        return kernels_aot.row(done, scaled.CASES[0])

    results = [result("0.10.2", "new_body"), result("0.11.2", "ssd_step")]
    text = tables.kernels_aot({"target": "sm_90a", "missing": {}, "results": results})
    assert "| ssd.step | 8B | mosaic_gpu | ssd_step | 109 |" in text and "new_body" not in text


def test_an_absent_python_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels_aot, "VERSIONS", {"0.10.2": "3.99"})
    assert kernels_aot.main(["--environments", str(tmp_path)]) == 77
    assert "no Python 3.99 here" in capsys.readouterr().out


def test_one_op_leaves_the_results_of_the_others(tmp_path):
    def entry(jax, op, registers):
        return {"jax": jax, "op": op, "registers": registers}

    versions = list(kernels_aot.VERSIONS)
    old = [entry(v, op, 1) for v in versions for op in ("attention", "paged_attention")]
    file = tmp_path / "found.json"
    file.write_text(json.dumps({"results": old}))
    new = [entry(v, "paged_attention", 2) for v in versions]
    both = [entry(v, op, n) for v in versions for op, n in (("attention", 1), ("paged_attention", 2))]
    assert kernels_aot.merged(new, "paged_attention", file) == both
    assert (
        kernels_aot.merged(new, None, file) == kernels_aot.merged(new, "attention", tmp_path / "none") == new
    )


def _dies(key):
    os._exit(3)


CASES = [
    dataclasses.replace(scaled.CASES[0], name="dies", inputs=_dies),
    *scaled.CASES,
    dataclasses.replace(
        scaled.CASES[0],
        name="too large",
        inputs=lambda key: {
            "x": jnp.zeros((64, 2048), jnp.bfloat16),
            "w": jnp.zeros((2048, 64), jnp.bfloat16),
        },
        gradients=(),
    ),
]


@pytest.mark.aot
def test_compiles_to_binaries_and_survives_a_crash():
    jobs = [Job("tests.kernels.proof.test_aot", case.name, case.implementations[0]) for case in CASES]
    dead, product, gather, large = compile_jobs(jobs)
    assert "the compiler died (3)" in str(dead.error)
    assert product.error is None and [k.name for k in product.kernels] == ["scaled_product"] * 2
    assert all(k.wgmma and k.tma and k.registers and not k.spill_bytes for k in product.kernels)
    assert product.faults(CASES[1]) == []
    assert gather.error is None and [k.name for k in gather.kernels] == ["scaled_gather"]
    assert "shared memory" in str(large.error)
