"""What the feed-forward blocks share: they keep nothing between tokens."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.batch import PackedBatch
from jaxllm.linear import Context


class Stateless(nnx.Module):
    """A mixer whose every token is by itself."""

    def __call__(
        self, x: Float[Array, "B T D"], batch: PackedBatch, ctx: Context
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        raise NotImplementedError

    def extend(
        self, x: Float[Array, "B T D"], batch: PackedBatch, state: None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], None, dict[str, Any]]:
        """Keeps nothing between tokens."""
        y, aux = self(x, batch, ctx)
        return y, None, aux

    def window(
        self, x: Float[Array, "B W D"], batch: PackedBatch, state: None, ctx: Context
    ) -> tuple[Float[Array, "B W D"], None, dict[str, Any]]:
        """Keeps nothing."""
        return self.extend(x, batch, state, ctx)

    def commit(self, window: None, path: Int[Array, "B m"], n: Int[Array, " B"]) -> None:
        """Nothing was kept."""
