"""Dispatch and the rounded contractions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.precision import contract
from tests.kernels.kernel_cases import close, normal


def test_explain_names_what_auto_takes_for_every_op():
    rows = dispatch.explain()
    assert [op for op, _, _ in rows] == sorted(dispatch.IMPLEMENTATIONS)
    assert len(rows) >= 6
    assert all(implementation == "xla" and len(reason) > 20 for _, implementation, reason in rows)


def test_auto_takes_the_first_that_supports_the_call(monkeypatch):
    from pallas_kernels.ssd import reference, xla

    monkeypatch.setattr(xla, "supports", lambda *_args, **_options: "not today")
    assert dispatch.choose("ssd", "auto") is reference
    with pytest.raises(ValueError, match="xla: not today"):
        dispatch.choose("ssd", "xla")


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
