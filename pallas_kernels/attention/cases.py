"""Cases of attention: small ones for the interpreter, and the shapes of the presets."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from pallas_kernels.attention.api import attention
from pallas_kernels.cases import Arrays, Case
from pallas_kernels.tree import ancestors, depths

GRADIENTS = ("q", "k", "v")


def _both(**arguments: Any) -> Any:
    """Output and log-sum-exp; the latter is 0 where nothing is seen, so that sums of results stay finite."""
    out, lse = attention(return_lse=True, **arguments)
    return out, jnp.where(lse == -jnp.inf, 0, lse)


def packed(B: int, T: int, documents: tuple[int, ...]) -> tuple[Array, Array]:
    """Segment ids and positions i32[B, T] of documents of these lengths, one after another; padding after them.

    Row b begins b documents later (and ends with the skipped ones), so that rows differ.
    """
    ids, positions = [], []
    for b in range(B):
        turned = documents[b % len(documents) :] + documents[: b % len(documents)]
        pad = T - sum(turned)
        ids.append(jnp.concatenate([*(jnp.full(n, s + 1) for s, n in enumerate(turned)), jnp.zeros(pad)]))
        positions.append(jnp.concatenate([*(jnp.arange(n) for n in turned), jnp.zeros(pad)]))
    return jnp.stack(ids).astype(jnp.int32), jnp.stack(positions).astype(jnp.int32)


def _inputs(
    B: int, T: int, H: int, K: int, d: int, documents: tuple[int, ...], S: int | None, key: PRNGKeyArray
) -> Arrays:
    """Packed rows; with S the queries are the last T of S rows, as in a chunk of prefill."""
    S = T if S is None else S
    ids, positions = packed(B, S, documents)
    draw = jax.random.split(key, 3)
    shapes = ((B, T, H, d), (B, S, K, d), (B, S, K, d))
    q, k, v = (jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(draw, shapes))
    places = {"q_positions": positions[:, S - T :], "q_segment_ids": ids[:, S - T :]}
    return {"q": q, "k": k, "v": v, **places, "kv_positions": positions, "kv_segment_ids": ids}


def _padding(arrays: Arrays) -> Arrays:
    own, keys = (arrays[name][..., None, None] == 0 for name in ("q_segment_ids", "kv_segment_ids"))
    return {"q": own, "k": keys, "v": keys}


def case(
    name: str,
    B: int,
    T: int,
    H: int,
    K: int,
    d: int,
    documents: tuple[int, ...],
    *,
    S: int | None = None,
    gradients: tuple[str, ...] = (),
    lse: bool = True,
    **more: Any,
) -> Case:
    """A case of packed rows, with the log-sum-exp or without; FLOPs count the visible pairs of each document."""
    rows = S or T
    pairs = B * sum(n * (n + 1) // 2 for n in documents)
    if S is not None:
        pairs = B * (S * (S + 1) - (S - T) * (S - T + 1)) // 2
    products = 2 + (5 if gradients else 0)
    moved = 2 * B * d * (2 * T * H + 2 * rows * K) * (3 if gradients else 1)
    inputs: Callable[[PRNGKeyArray], Arrays] = partial(_inputs, B, T, H, K, d, documents, S)
    return Case(
        name=name,
        op="attention",
        function=_both if lse else attention,
        inputs=inputs,
        gradients=gradients,
        oracle_options={"operand_dtype": jnp.float32},
        flops=2.0 * products * pairs * H * d,
        bytes_moved=float(moved),
        registers=168,
        **more,
    )


def _tree(B: int, W: int, H: int, K: int, d: int, key: PRNGKeyArray) -> Arrays:
    """Windows of W nodes of random trees that hang on 9 committed tokens; the last three nodes are padding."""
    draw = jax.random.split(key, 4)
    shapes = ((B, W, H, d), (B, W, K, d), (B, W, K, d))
    q, k, v = (jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(draw, shapes))
    parents = jax.random.randint(draw[3], (B, W), -1, jnp.arange(W))
    live = jnp.broadcast_to(jnp.arange(W) < W - 3, (B, W))
    mask = ancestors(parents, live)
    ids, positions = live.astype(jnp.int32), 9 + depths(mask)
    places = {"q_positions": positions, "q_segment_ids": ids}
    return {"q": q, "k": k, "v": v, **places, "kv_positions": positions, "kv_segment_ids": ids, "mask": mask}


def tree_case(
    name: str, B: int, W: int, H: int, K: int, d: int, *, gradients: tuple[str, ...] = (), **more: Any
) -> Case:
    """A case of tree windows; FLOPs count all pairs, bytes what a tile must move."""
    return Case(
        name=name,
        op="attention",
        function=_both,
        inputs=partial(_tree, B, W, H, K, d),
        gradients=gradients,
        padding=_padding,
        poison=1e30,
        oracle_options={"operand_dtype": jnp.float32},
        flops=4.0 * B * W * W * H * d,
        bytes_moved=float(2 * B * W * d * (2 * H + 2 * K)),
        registers=168,
        **more,
    )


# Heads of 256: dK and dV of 64 keys leave too few registers for a soft-capped and masked tile.
WIDE_SPILL = 700

CASES = [
    case(
        "tiny packed",
        1,
        136,
        2,
        1,
        64,
        (60, 57),
        gradients=GRADIENTS,
        small=True,
        padding=_padding,
        poison=1e30,
    ),
    case(
        "tiny window and soft cap",
        1,
        72,
        1,
        1,
        256,
        (72,),
        gradients=GRADIENTS,
        small=True,
        options={"window": 40, "soft_cap": 2.0},
        spill_bytes=WIDE_SPILL,
    ),
    case("tiny chunk", 1, 64, 2, 2, 64, (200,), S=200, small=True),
    tree_case("tiny tree", 2, 40, 2, 1, 64, gradients=GRADIENTS, small=True),
    tree_case("Nano tree 32 d128", 16, 32, 32, 2, 128),
    tree_case("8B tree 64 d128", 16, 64, 32, 8, 128),
    case("Nano 8k d128", 1, 8192, 32, 2, 128, (8192,), gradients=GRADIENTS, oracle="xla"),
    case(
        "Nano packed 8k d128",
        1,
        8192,
        32,
        2,
        128,
        (4096, 1024, 2048, 512, 500),
        gradients=GRADIENTS,
        oracle="xla",
    ),
    case("Jet 4k d128", 2, 4096, 12, 2, 128, (4096,), gradients=GRADIENTS, oracle="xla"),
    case("Jet 4k d64", 2, 4096, 12, 2, 64, (4096,), gradients=GRADIENTS, oracle="xla"),
    case(
        "Jet 4k d96 window",
        2,
        4096,
        12,
        2,
        96,
        (4096,),
        gradients=GRADIENTS,
        oracle="xla",
        options={"window": 1024},
    ),
    case("8B prefill 16k d128", 1, 16384, 32, 8, 128, (16384,), oracle="xla"),
    case("8B chunk 2k of 16k d128", 1, 2048, 32, 8, 128, (16384,), S=16384, oracle="xla"),
    case("8B ragged 4k d128", 1, 4008, 32, 8, 128, (4001,), gradients=GRADIENTS, oracle="xla"),
    # Theirs has no log-sum-exp.
    case(
        "8B packed 4k d128 through cuDNN",
        2,
        4096,
        32,
        8,
        128,
        (2048, 1024, 512, 500),
        gradients=GRADIENTS,
        lse=False,
        oracle="xla",
        implementations=("cudnn",),
    ),
    case("8B train 4k d128", 2, 4096, 32, 8, 128, (4096,), gradients=GRADIENTS, oracle="xla"),
    case(
        "wide 4k d256 soft cap",
        1,
        4096,
        16,
        8,
        256,
        (4096,),
        gradients=GRADIENTS,
        oracle="xla",
        options={"soft_cap": 50.0},
        spill_bytes=WIDE_SPILL,
    ),
]
