"""One of two processes of ``fcp_pair``, on a core of its own: kernels, transfers between the two, and steps together."""

import os

# Before XLA sizes its pools by the cores that it may use.
os.sched_setaffinity(0, {int(os.environ["FCP_PAIR_CORE"])})

import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from experiments.bench._fcp_cpu import Kernel, backward, forward, turn_by_turn  # noqa: E402
from experiments.bench._fcp_pair import WORKERS, pair_plan  # noqa: E402
from experiments.bench._protocol import serve  # noqa: E402
from pallas_kernels.attention import attention  # noqa: E402
from parallel.context import (  # noqa: E402
    Exchange,
    Layout,
    compiled_bytes,
    context_attention,
    layout,
    own,
    plan_specs,
)
from parallel.context.costs import AttentionShape  # noqa: E402
from parallel.distributed import start  # noqa: E402

AXIS = "context"
EACH = PartitionSpec(AXIS)


def _losses(out: jax.Array, targets: jax.Array) -> jax.Array:
    """Of each token, half the squared distance of its output from a target."""
    return 0.5 * jnp.sum(jnp.square(out - targets), axis=(-2, -1))


def _with_gradients(losses: Callable[..., jax.Array], *qkv: jax.Array) -> tuple[jax.Array, Any]:
    """Each token's loss, and gradients of their sum, which is taken in float64 outside."""
    each, back = jax.vjp(losses, *qkv)
    return each, back(jnp.ones_like(each))


class Half:
    """Attention in float32 and a loss after it, on this process's half of a batch."""

    def join(self, shape: dict[str, int]) -> dict[str, Any]:
        """Meet the other process."""
        start(os.environ, timeout=120)
        self.shape = AttentionShape(**shape)
        self.mesh = Mesh(np.array(jax.devices()), (AXIS,))
        self.steps: dict[str, Callable[[], Any]] = {}
        self._sum = jax.jit(
            jax.shard_map(
                lambda x: lax.psum(x, AXIS), mesh=self.mesh, in_specs=EACH, out_specs=PartitionSpec()
            )
        )
        self._one = self._global(np.ones(WORKERS, np.float32), EACH)
        self._meet()
        return {"process": jax.process_index(), "cores": sorted(os.sched_getaffinity(0))}

    def kernels(self, phase: str, sizes: list[list[int]], repeats: int, together: bool) -> list[list[float]]:
        """Seconds of each kernel, time after time; ``together``: both processes begin at the same moment."""
        make = {"forward": forward, "backward": backward}[phase]
        wanted: list[Kernel] = [(queries, keys, pairs) for queries, keys, pairs in sizes]
        calls = {kernel: make(kernel, self.shape) for kernel in wanted}
        if together:
            turn_by_turn(calls, 0)
            self._meet()
        times = turn_by_turn(calls, repeats)
        return [times[kernel] for kernel in wanted]

    def transfers(self, sizes: list[int], repeats: int) -> list[dict[str, Any]]:
        """Seconds of permutations of so many bytes between the two, and of this core in one of them."""
        move = jax.shard_map(
            lambda x: lax.ppermute(x, AXIS, [(0, 1), (1, 0)]), mesh=self.mesh, in_specs=EACH, out_specs=EACH
        )
        calls = {}
        for size in sizes:
            sent = self._global(np.ones((WORKERS, size // 4), np.float32), EACH)
            compiled = jax.jit(move).lower(sent).compile()
            calls[size] = lambda compiled=compiled, sent=sent: compiled(sent)
        found = []
        for size, call in calls.items():
            self._meet()
            begin = time.process_time()
            times = turn_by_turn({size: call}, repeats)[size]
            cpu = (time.process_time() - begin) / (repeats + 1)
            found.append({"bytes": size, "seconds": times, "cpu_seconds": cpu})
        return found

    def alone(self, lengths: list[int]) -> float:
        """Keep a batch and its gradients as this process computes them by itself; returns the loss."""
        heads, kv_heads, size = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        tokens, rng = sum(lengths), np.random.default_rng(0)
        self.lengths = np.array(lengths)
        self.batch = [
            rng.standard_normal((tokens, n, size)).astype(np.float32)
            for n in (heads, kv_heads, kv_heads, heads)
        ]
        q, k, v, targets = (jnp.asarray(x)[None] for x in self.batch)
        ids = jnp.asarray(np.repeat(np.arange(len(lengths)) + 1, lengths), jnp.int32)[None]
        places = jnp.asarray(np.concatenate([np.arange(n) for n in lengths]), jnp.int32)[None]

        def losses(*qkv: jax.Array) -> jax.Array:
            out = attention(
                *qkv, q_positions=places, kv_positions=places, q_segment_ids=ids, kv_segment_ids=ids
            )
            return _losses(out, targets)

        each, gradients = jax.jit(partial(_with_gradients, losses))(q, k, v)
        self.gradients = [np.asarray(x[0]) for x in gradients]
        return float(np.asarray(each, np.float64).sum())

    def prepare(self, name: str, kind: str, block: int) -> dict[str, Any]:
        """Compile a strategy's step of the batch; what it sends, its part of the loss, the largest errors of gradients.

        Returns:
            bytes: received in a step, by kind of collective, as compiled.
            loss: of this process's tokens.
            errors: of gradients of q, k and v against those of one process, over the largest of those.
        """
        plan = pair_plan(self.lengths, block, kind)
        places, exchange = layout(plan), Exchange(plan.capacity, AXIS)
        there = places.index >= 0
        slots = [np.where(there[..., None, None], x[np.maximum(places.index, 0)], 0) for x in self.batch]

        def losses(*given: Any) -> jax.Array:
            q, k, v, targets, arrays, places = (own(x) for x in given)
            out = context_attention(q, k, v, arrays, places, exchange)
            return _losses(out, targets)[None]

        specs = (EACH, EACH, EACH, EACH, *plan_specs(AXIS))
        over = jax.shard_map(losses, mesh=self.mesh, in_specs=specs, out_specs=EACH, check_vma=False)

        def step(q: Any, k: Any, v: Any, *rest: Any) -> Any:
            return _with_gradients(lambda *qkv: over(*qkv, *rest), q, k, v)

        given = jax.tree.map(self._global, (*slots, plan.arrays, Layout(*places)), specs)
        compiled = jax.jit(step).lower(*given).compile()
        self.steps[name] = lambda: compiled(*given)
        each, gradients = self.steps[name]()
        mine = places.index[jax.process_index()]
        at, errors = mine[mine >= 0], []
        for ours, theirs in zip(gradients, self.gradients, strict=True):
            local = np.asarray(ours.addressable_data(0))[0][mine >= 0]
            errors.append(float(np.abs(local - theirs[at]).max() / np.abs(theirs).max()))
        return {
            "bytes": compiled_bytes(compiled.as_text(), WORKERS),
            "loss": float(np.asarray(each.addressable_data(0), np.float64).sum()),
            "errors": errors,
        }

    def race(self, names: list[str], rounds: int) -> dict[str, dict[str, list[float]]]:
        """Seconds of each step and of this core in it, turn by turn; every turn begins with another one."""
        found: dict[str, dict[str, list[float]]] = {
            name: {"seconds": [], "cpu_seconds": []} for name in names
        }
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                self._meet()
                begin, cpu = time.perf_counter(), time.process_time()
                jax.block_until_ready(self.steps[name]())
                found[name]["seconds"].append(time.perf_counter() - begin)
                found[name]["cpu_seconds"].append(time.process_time() - cpu)
        return found

    def _global(self, x: np.ndarray, spec: PartitionSpec) -> jax.Array:
        return jax.make_array_from_callback(
            x.shape, NamedSharding(self.mesh, spec), lambda index: np.ascontiguousarray(x[index])
        )

    def _meet(self) -> None:
        self._sum(self._one).block_until_ready()


def _end_without(parent: int) -> None:
    """End with the driver, even in a collective that waits for the other process."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_without, args=(os.getppid(),), daemon=True).start()
    serve(Half())
