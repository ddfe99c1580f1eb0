"""The bounds, measured like a contender: the model's own products, and a stream over as many bytes as decode moves."""

import time
from typing import Any

import _bounds
from _protocol import peak_rss_mib, serve


class Machine:
    """Bare JAX: matrix products and sums, nothing of a model."""

    def setup(self, config: dict[str, Any], precision: str, **_: Any) -> dict[str, Any]:
        import jax
        import jax.numpy as jnp

        self.jax, self.jnp = jax, jnp
        self.config = config
        self.dtype = jnp.float32 if precision == "fp32" else jnp.bfloat16
        self.runs: dict[str, Any] = {}
        return {"versions": {"jax": jax.__version__}}

    def prepare(self, task: dict[str, Any], **_: Any) -> dict[str, Any]:
        make = self._stream if task["kind"] == "decode" else self._products
        self.runs = {"run": make(task)}
        return {"once": self._once()}

    def measure(self, repeats: int, **_: Any) -> dict[str, Any]:
        return {"seconds": [self._once() for _ in range(repeats)], "peak_rss_mib": peak_rss_mib()}

    def _once(self) -> float:
        start = time.perf_counter()
        self.runs["run"]()
        return time.perf_counter() - start

    def _products(self, task: dict[str, Any]) -> Any:
        jax, jnp = self.jax, self.jnp
        dot = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
        operands = []
        for (m, k, n), count in _bounds.products(self.config, task).items():
            a, b = jnp.ones((m, k), self.dtype), jnp.ones((k, n), self.dtype)
            dot(a, b).block_until_ready()
            operands.append((a, b, count))

        def run() -> None:
            for a, b, count in operands:
                for _ in range(count):
                    dot(a, b).block_until_ready()

        return run

    def _stream(self, task: dict[str, Any]) -> Any:
        jax, jnp = self.jax, self.jnp
        item = jnp.dtype(self.dtype).itemsize
        words = _bounds.decode_bytes(self.config, task, item) // 4
        table = jnp.ones((-(-words // 1024), 1024), jnp.float32)
        vector = jnp.ones((1, 1024), jnp.float32)
        # Which loop XLA makes of a sum differs by machine and version: the fastest one is the bound.
        sums = [
            jax.jit(lambda x, v: x.sum(axis=1)),
            jax.jit(lambda x, v: x.reshape(2, -1).sum(axis=1) if x.shape[0] % 2 == 0 else x.sum(axis=0)),
            jax.jit(lambda x, v: v @ x.T),
        ]

        def seconds(f: Any) -> float:
            f(table, vector).block_until_ready()
            taken = []
            for _ in range(5):
                start = time.perf_counter()
                f(table, vector).block_until_ready()
                taken.append(time.perf_counter() - start)
            return min(taken)

        best = min(sums, key=seconds)
        return lambda: best(table, vector).block_until_ready()


if __name__ == "__main__":
    serve(Machine())
