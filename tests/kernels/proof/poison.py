"""A proof that cannot fail proves nothing: kernels are broken on purpose, and the numerics must notice."""

from types import ModuleType
from typing import Any

import jax
import pytest

from pallas_kernels import compat
from pallas_kernels.cases import Case
from pallas_kernels.proof import numerics


def must_fail(
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    constant: str,
    value: Any,
    case: Case,
    implementation: str,
) -> None:
    """The interpreted case passes as it is, and not with ``module.constant`` set to ``value``."""
    with compat.interpreted():
        numerics.compare_case(case, implementation, repeat=False).require(case.tolerance)
        with monkeypatch.context() as patch:
            patch.setattr(module, constant, value)
            # Pallas keeps the traces of kernel bodies, and with them the old constant.
            jax.clear_caches()
            with pytest.raises(AssertionError, match="errors above"):
                numerics.compare_case(case, implementation, repeat=False).require(case.tolerance)
    jax.clear_caches()
