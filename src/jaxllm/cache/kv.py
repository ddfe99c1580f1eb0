"""How a user says that keys and values are kept."""

from dataclasses import dataclass

import jax.numpy as jnp

from jaxllm.cache.policies.base import Policy
from jaxllm.config import Precision, one_of, require

_BITS = {"int8": 8, "int4": 4}
_PAGE = 16


@dataclass(frozen=True)
class KVCache:
    """How keys and values of full attention layers are kept; sliding windows keep rings in a float dtype.

    Attributes:
        dtype: "compute" (the run's compute dtype), "float32", "bfloat16", "int8" or "int4". Integers are asymmetric
            codes with a scale and an offset in float16 for every token and head; a slot's last tokens, up to a page,
            stay in the compute dtype until their page is full.
        page_size: tokens of a page. None: that of the policy; 16 for integers; else a slot's tokens lie in one piece,
            the fastest to read while slots share nothing (16 again with ``pool_tokens``).
        keys_per_channel: with integers, keys have a scale and an offset for every channel of a page instead.
        draft: most tokens that may be appended and rolled back again.
        pool_tokens: tokens for which there are pages, handed out to the requests as they grow; a multiple of the page.
            Where they run short, requests wait, and the youngest one makes room for the others. None: every slot owns
            pages for the longest request.
        prefixes: with ``pool_tokens``, a request takes the pages of an earlier prompt that begins as its own does.
            Nothing is shared where a policy evicts. Where more than plain pages has to be found again (recurrent layers,
            sliding windows, integer keys and values), a prefix is known at the ends of a prompt's chunks only.
        snapshots: prefixes of which the states of recurrent layers and sliding windows are kept, for those models.
    """

    dtype: str = "compute"
    page_size: int | None = None
    keys_per_channel: bool = False
    draft: int = 0
    pool_tokens: int | None = None
    prefixes: bool = True
    snapshots: int = 8

    def __post_init__(self) -> None:
        one_of("kv.dtype", self.dtype, "compute", "float32", "bfloat16", *_BITS)
        least = 1 if self.bits is None else 2
        allowed = f"None or at least {least}" + ("" if self.bits is None else f" for {self.dtype}")
        require(
            self.page_size is None or (isinstance(self.page_size, int) and self.page_size >= least),
            "kv.page_size",
            self.page_size,
            allowed,
        )
        require(
            not self.keys_per_channel or self.bits is not None,
            "kv.keys_per_channel",
            True,
            f"needs dtype int8 or int4, not {self.dtype}",
        )
        require(self.draft >= 0, "kv.draft", self.draft, "must be at least 0")
        require(self.snapshots >= 0, "kv.snapshots", self.snapshots, "must be at least 0")
        page = self.page_size or 1
        require(
            self.pool_tokens is None or (self.pool_tokens > 0 and self.pool_tokens % page == 0),
            "kv.pool_tokens",
            self.pool_tokens,
            f"None, or a multiple of the page of {page} tokens" if page > 1 else "None or at least 1",
        )

    @property
    def bits(self) -> int | None:
        """Of a code; None for floats."""
        return _BITS.get(self.dtype)

    def float_dtype(self, precision: Precision) -> jnp.dtype:
        """Of keys and values that are not codes."""
        compute = self.dtype == "compute" or self.bits is not None
        return jnp.dtype(precision.compute if compute else self.dtype)

    def pages_of(self, policy: Policy) -> int | None:
        """Tokens of a page under ``policy``; None: slots in one piece."""
        if self.page_size is not None:
            return self.page_size
        used = [policy, *(each for _, each in policy.overrides)]
        wanted = [each.default_page_size for each in used if each.default_page_size is not None]
        if wanted:
            return max(wanted)
        paged = self.bits is not None or self.draft or self.pool_tokens is not None
        paged = paged or any(type(each) is not Policy for each in used)
        return _PAGE if paged else None
