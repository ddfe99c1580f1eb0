"""Dispatch by device, record and call; the rounded contractions."""

import shutil
from dataclasses import replace
from types import ModuleType
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, dispatch, records
from pallas_kernels.attention import attention, cudnn, xla
from pallas_kernels.attention.mask import Marks
from pallas_kernels.attention.options import Options
from pallas_kernels.precision import contract
from pallas_kernels.proof import lowering
from pallas_kernels.target import Target, target
from tests.kernels.kernel_cases import close, normal

H200 = Target("cuda", "NVIDIA H200", (9, 0))
OPTIONS = Options(window=None, soft_cap=None, scale=1.0, kv_layout="BTKD", operand_dtype=None)
CALL = (Marks(None, None, None, None), OPTIONS)


@pytest.fixture
def h200(monkeypatch, tmp_path):
    """Traces are for an H200 with cuDNN whose records lie in an empty folder."""
    monkeypatch.setattr(compat, "cudnn_version", lambda: 91000)
    monkeypatch.setattr(records, "local", lambda: tmp_path)
    with compat.abstract_device(H200.kind, "cuda"):
        yield tmp_path


def queries(dtype=jnp.bfloat16, T: int = 64, d: int = 64) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros((2, T, heads, d), dtype) for heads in (4, 2, 2))


def test_explain_names_what_auto_takes_for_every_op():
    rows = dispatch.explain()
    assert [row.op for row in rows] == sorted(dispatch.IMPLEMENTATIONS)
    assert len(rows) >= 6
    assert all(row.implementation == "xla" and len(row.reason) > 20 and not row.unverified for row in rows)
    reasons = {row.op: row.reason for row in rows}
    assert reasons["attention"].endswith("cudnn: it needs an NVIDIA GPU, not cpu")
    assert reasons["ssd.window"].endswith("no GPU kernel of this op is present")


def test_explain_says_what_lacks_a_record(h200):
    row = next(row for row in dispatch.explain() if row.op == "attention")
    assert row.implementation == "xla" and "cudnn" in row.unverified
    assert f"cudnn: {dispatch.VERIFY}" in row.reason


def test_auto_takes_the_first_that_supports_the_call(monkeypatch):
    from pallas_kernels.ssd import reference, xla

    monkeypatch.setattr(xla, "supports", lambda *_args, **_options: "not today")
    assert dispatch.choose("ssd", "auto") is reference
    with pytest.raises(ValueError, match="xla: not today"):
        dispatch.choose("ssd", "xla")


def test_a_whole_call_is_told_what_each_op_shall_take():
    from pallas_kernels.ssd import reference, xla

    shapes = queries()
    with dispatch.naming({"ssd": "reference"}):
        assert dispatch.choose("ssd", "auto") is reference and dispatch.choose("ssd", "xla") is xla
        with dispatch.naming({"ssd": "xla", "attention": "cudnn"}):
            assert dispatch.choose("ssd", "auto") is xla
            with pytest.raises(ValueError, match="cudnn: it needs an NVIDIA GPU, not cpu"):
                dispatch.choose("attention", "auto", *shapes, *CALL)
        assert dispatch.choose("ssd", "auto") is reference
    assert dispatch.choose("ssd", "auto") is xla
    for wrong, message in (({"scan": "xla"}, "op='scan'"), ({"ssd": "cudnn"}, "'xla', 'reference' for ssd")):
        with pytest.raises(ValueError, match=message), dispatch.naming(wrong):
            pass


def test_a_jitted_call_is_traced_anew_under_another_name():
    seen = []

    @jax.jit
    def call(x):
        seen.append(dispatch.choose("ssd", "auto").__name__.rsplit(".", 1)[1])
        return x

    call(1.0)
    with dispatch.naming({"ssd": "reference"}):
        call(1.0)
        call(1.0)
    assert seen == ["xla", "reference"]


def test_auto_takes_what_is_verified_on_this_device_with_these_sources(h200, monkeypatch):
    assert dispatch.choose("attention", "auto", *queries(), *CALL) is xla
    # Named, it needs no record.
    assert dispatch.choose("attention", "cudnn", *queries(), *CALL) is cudnn
    records.write(h200, H200.kind, {"attention": {"cudnn": 3}})
    assert dispatch.choose("attention", "auto", *queries(), *CALL) is cudnn
    assert dispatch.choose("attention", "auto", *queries(), CALL[0], replace(OPTIONS, soft_cap=30.0)) is xla
    with compat.abstract_device("NVIDIA H100", "cuda"):
        assert dispatch.choose("attention", "auto", *queries(), *CALL) is xla
    monkeypatch.setattr(records, "sources", lambda op: "other")
    assert dispatch.choose("attention", "auto", *queries(), *CALL) is xla
    assert (
        records.verified("attention", "cudnn", H200.kind) == "its sources have changed since it was verified"
    )


def test_a_pass_is_of_all_that_the_kernels_are_made_of(tmp_path, monkeypatch):
    """Parts of other ops too, whoever hands them on; not what they are compared with."""
    root = records._ROOT
    found = {file.relative_to(root).as_posix() for file in records.parts("gated_delta")}
    assert {"gated_delta/api.py", "ssd/mosaic_outputs.py", "attention/common.py", "mosaic.py"} <= found
    assert not {"ssd/xla.py", "gated_delta/xla.py", "gated_delta/cases.py", "dispatch.py"} & found
    before = records.sources("gated_delta")
    copy = tmp_path / root.name
    shutil.copytree(root, copy)
    monkeypatch.setattr(records, "_ROOT", copy)
    for changed, other in (("dispatch.py", False), ("ssd/xla.py", False), ("attention/blocks.py", True)):
        with open(copy / changed, "a") as file:
            file.write("# another line\n")
        records.sources.cache_clear()
        assert (records.sources("gated_delta") != before) == other
    records.sources.cache_clear()


def test_a_failure_takes_an_earlier_pass_back(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "local", lambda: tmp_path)
    records.write(tmp_path, H200.kind, {"attention": {"cudnn": 3}, "ssd": {"triton": 1}})
    assert records.verified("attention", "cudnn", H200.kind) is None
    records.write(tmp_path, H200.kind, {"attention": {"cudnn": None}})
    assert "no pass" in str(records.verified("attention", "cudnn", H200.kind))
    assert records.verified("ssd", "triton", H200.kind) is None


@pytest.mark.parametrize(
    ("kind", "capability", "taken"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0), "cudnn"),
        ("NVIDIA L4", (8, 9), "cudnn"),
        ("a GPU of a name only", None, "cudnn"),
        ("NVIDIA H200", (9, 0), "triton"),
        ("NVIDIA B200", (10, 0), "triton"),
    ],
)
def test_before_hopper_auto_takes_no_kernel_of_ours_whatever_passed(
    kind, capability, taken, monkeypatch, tmp_path
):
    """Their records are of GPUs on which nobody tuned them; named, they run."""
    device = Target("cuda", kind, capability)
    monkeypatch.setattr(compat, "cudnn_version", lambda: 91000)
    monkeypatch.setattr(records, "local", lambda: tmp_path)
    monkeypatch.setattr(dispatch, "target", lambda: device)
    modules = {name: ModuleType(name) for name in ("triton", "cudnn", "xla")}
    for name, module in modules.items():
        vars(module).update(supports=lambda *_: None, REASON=name)
    monkeypatch.setattr(dispatch, "_module", lambda op, name: modules.get(name))
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", {"attention": ("triton", "cudnn", "xla")})
    records.write(tmp_path, kind, {"attention": {"triton": 5, "cudnn": 3}})
    assert dispatch.choose("attention", "auto") is modules[taken]
    (row,) = dispatch.explain(device)
    # Verifying again would change nothing: it is not what is missing.
    assert row.implementation == taken and not row.unverified
    assert ("triton: before Hopper it runs where it is named only" in row.reason) == (taken == "cudnn")
    assert dispatch.choose("attention", "triton") is modules["triton"]


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        ("mosaic_gpu", Target("cpu", "cpu"), "needs a Hopper GPU, not cpu"),
        ("mosaic_gpu", Target("cuda", "NVIDIA B200", (10, 0)), "needs a Hopper GPU"),
        ("mosaic_gpu", H200, None),
        ("triton", Target("tpu", "TPU v5e"), "needs an NVIDIA GPU, not TPU v5e"),
        ("triton", Target("rocm", "AMD Instinct MI300X"), "needs an NVIDIA GPU"),
        ("triton", Target("cuda", "Tesla T4", (7, 5)), "capability 8.0 or later"),
        ("triton", Target("cuda", "NVIDIA L4", (8, 9)), None),
        ("cudnn", H200, "no cuDNN"),
        ("xla", Target("tpu", "TPU v5e"), None),
    ],
)
def test_each_implementation_knows_its_devices(name, device, reason, monkeypatch):
    monkeypatch.setattr(compat, "cudnn_version", lambda: None)
    found = dispatch.unfit(name, device)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize("found", [None, 91_000, RuntimeError("cuDNN not found.")])
def test_the_version_of_cudnn_is_none_where_it_is_not_installed(found, monkeypatch):
    """JAX has no versions without CUDA's plugin, and raises where the plugin is there without cuDNN."""
    versions = None if found is None else Mock(cudnn_get_version=Mock(side_effect=[found]))
    monkeypatch.setattr("jax._src.lib.cuda_versions", versions, raising=False)
    assert compat.cudnn_version() == (found if isinstance(found, int) else None)


def test_a_named_implementation_that_cannot_run_here_is_an_error():
    places = {name: jnp.zeros((2, 64), jnp.int32) for name in ("q_positions", "kv_positions")}
    places |= {name: jnp.ones((2, 64), jnp.int32) for name in ("q_segment_ids", "kv_segment_ids")}
    with pytest.raises(ValueError, match="cudnn: it needs an NVIDIA GPU, not cpu"):
        attention(*queries(), **places, implementation="cudnn")


@pytest.mark.parametrize(
    ("arrays", "change", "reason"),
    [
        (queries(jnp.float32), {}, "bfloat16 or float16"),
        ((*queries()[:2], queries(jnp.float16)[2]), {}, "bfloat16 or float16"),
        (queries(), {"operand_dtype": jnp.float32}, "operand_dtype=float32"),
        (queries(), {"kv_layout": "BKTD"}, "kv_layout='BKTD'"),
        (queries(d=256), {}, "up to 128, not 256"),
        (queries(d=60), {}, "multiples of 8"),
        (queries(), {"soft_cap": 30.0}, "soft cap"),
        (queries(), {"return_lse": True}, "log-sum-exp"),
        (queries(T=63), {}, "even lengths"),
        (queries(jnp.float16), {"operand_dtype": jnp.float16}, None),
        (queries(), {"window": 8}, None),
    ],
)
def test_cudnn_takes_only_what_it_computes_exactly(arrays, change, reason):
    found = cudnn.supports(*arrays, CALL[0], replace(OPTIONS, **change))
    assert found is None if reason is None else reason in str(found)
    big = tuple(jax.ShapeDtypeStruct((1, 2**15, 4, 64), jnp.bfloat16) for _ in range(3))
    assert "cost more" in str(cudnn.supports(*big, *CALL))


def test_a_trace_knows_its_device():
    assert target().platform == "cpu"
    seen = []
    jax.eval_shape(lambda: seen.append(target()))
    lowering.lower_cuda(lambda x: seen.append(target()) or x, jnp.zeros(2))
    lowering.lower_tpu(lambda x: seen.append(target()) or x, jnp.zeros(2))
    assert seen == [Target("cpu", "cpu"), H200, Target("tpu", "TPU v5e")]


@pytest.mark.parametrize("spec", ["bti,io->bto", "bkmd,bskd->bkms"])
def test_contract_rounds_operands_and_cotangents(spec):
    shapes = {"bti,io->bto": ((2, 3, 4), (4, 5)), "bkmd,bskd->bkms": ((2, 3, 4, 5), (2, 6, 3, 5))}[spec]
    a, b = (jnp.asarray(normal(0, *shape)) for shape in shapes)
    g = jnp.asarray(normal(1, *jnp.einsum(spec, a, b).shape))
    rounded = [v.astype(jnp.bfloat16).astype(jnp.float32) for v in (a, b, g)]

    def plain(a, b):
        return jnp.einsum(spec, a, b, precision="highest")

    wanted, pull = jax.vjp(plain, *rounded[:2])
    got, pull_rounded = jax.vjp(lambda a, b: contract(spec, a, b, operand_dtype=jnp.bfloat16), a, b)
    close((got, *pull_rounded(g)), (wanted, *pull(rounded[2])), 1e-6)
    close(contract(spec, a, b), np.asarray(plain(a, b)), 1e-6)


@pytest.mark.parametrize("spec", ["ij,jk", "ij,jk->k", "...j,jk->...k"])
def test_contract_refuses_what_it_cannot_differentiate(spec):
    with pytest.raises(ValueError, match="spec="):
        contract(spec, jnp.ones((2, 2)), jnp.ones((2, 2)))
