"""On 8 simulated devices: recurrent layers over scattered documents beside the ops over the packed ones, as JSON.

Every case runs plans of all strategies through one program, forward and backward.
"""

import json
import re
import sys

from jaxtyping import install_import_hook

with install_import_hook(["parallel", "pallas_kernels"], "beartype.beartype"):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.causal_conv import causal_conv
    from pallas_kernels.dynamic_conv import dynamic_conv
    from pallas_kernels.gated_delta import gated_delta
    from pallas_kernels.ssd import ssd
    from parallel.context import (
        STRATEGIES,
        PlanConfig,
        contiguous_lanes,
        halo,
        lane_specs,
        layout,
        make_lanes,
        make_plan,
        recurrence,
    )

TOKENS, DOCUMENTS = 60, 12
H, P, G, N = 2, 3, 1, 5
HK, HV, DK, DV = 1, 2, 3, 5
D = 5
STATES = {"ssd": (H, P, N), "delta": (HV, DK, DV)}
AXES = {1: ("context",), 2: ("data", "context")}


def random(rng: np.random.Generator) -> tuple[dict, dict]:
    """What tokens carry [TOKENS, ...], and parameters."""

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    k = normal(TOKENS, HK, DK)
    packed = {
        "ssd": (
            normal(TOKENS, H, P),
            np.logaddexp(0, normal(TOKENS, H)),
            normal(TOKENS, G, N),
            normal(TOKENS, G, N),
        ),
        "delta": (
            normal(TOKENS, HK, DK),
            k / np.linalg.norm(k, axis=-1, keepdims=True),
            normal(TOKENS, HV, DV),
            -np.logaddexp(0, normal(TOKENS, HV) - 1),
            2 / (1 + np.exp(normal(TOKENS, HV))),
        ),
        "conv": (normal(TOKENS, D),),
        "dynamic": (normal(TOKENS, D), normal(TOKENS, 3, D)),
    }
    parameters = {"ssd": (-np.exp(normal(H) - 1), normal(H)), "conv": (normal(4, D), normal(D))}
    return packed, parameters


def loss(outputs: dict, states: dict, weights: dict) -> jax.Array:
    return sum(jnp.vdot(v, weights[name]) for name, v in [*outputs.items(), *states.items()])


@jax.jit
def alone(packed: dict, parameters: dict, segment_ids, weights: dict):
    """Outputs, final states and gradients of the ops over one packed row."""

    def run(packed, parameters):
        rows = jax.tree.map(lambda v: v[None], packed)
        documents = {"segment_ids": segment_ids[None], "num_segments": DOCUMENTS}
        x, dt, B, C = rows["ssd"]
        A, skip = parameters["ssd"]
        outputs, states = {}, {}
        outputs["ssd"], states["ssd state"] = ssd(x, dt, A, B, C, skip, chunk_size=8, **documents)
        outputs["delta"], states["delta state"] = gated_delta(*rows["delta"], chunk_size=8, **documents)
        outputs["conv"], _ = causal_conv(*rows["conv"], *parameters["conv"], segment_ids=segment_ids[None])
        outputs["dynamic"], _ = dynamic_conv(*rows["dynamic"], segment_ids=segment_ids[None])
        outputs = {name: masked(v[0], segment_ids > 0) for name, v in outputs.items()}
        states = {name: v[0] for name, v in states.items()}
        return loss(outputs, states, weights), (outputs, states)

    (_, found), gradients = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(packed, parameters)
    return found, gradients


def masked(values, mask):
    return jnp.where(mask.reshape(-1, *[1] * (values.ndim - 1)), values, 0)


def scan_ssd(rows, parameters, where):
    x, dt, B, C = rows["ssd"]
    A, skip = parameters["ssd"]
    return recurrence.ssd(x, dt, A, B, C, skip, chunk_size=8, **where)


def scan_delta(rows, parameters, where):
    return recurrence.gated_delta(*rows["delta"], chunk_size=8, **where)


def convolve(rows, parameters, where):
    return halo.causal_conv(*rows["conv"], *parameters["conv"], **where), None


def convolve_dynamic(rows, parameters, where):
    return halo.dynamic_conv(*rows["dynamic"], **where), None


OPS = {"ssd": scan_ssd, "delta": scan_delta, "conv": convolve, "dynamic": convolve_dynamic}


def mapped(mesh, axis, names):
    """Outputs and states of the named ops, of rows that are sharded over the axis."""

    def local(rows, parameters, lanes):
        found = {name: OPS[name](rows, parameters, {"lanes": lanes, "axis": axis}) for name in names}
        outputs = {name: y for name, (y, _) in found.items()}
        return outputs, {f"{name} state": left for name, (_, left) in found.items() if left is not None}

    own, everyone = jax.P(axis), jax.P()
    return jax.shard_map(
        local, mesh=mesh, in_specs=(own, everyone, lane_specs(axis)), out_specs=own, check_vma=False
    )


def scattered(mesh, axis, counts: list):
    """The same as :func:`alone`, of a plan: slots gathered from the packed row, and outputs gathered back."""
    call = mapped(mesh, axis, OPS)

    @jax.jit
    def program(packed, parameters, index, place, lanes, weights):
        counts.append(1)

        def run(packed, parameters):
            # Large on padding: whoever reads it is found out.
            rows = jax.tree.map(
                lambda v: jnp.where((index >= 0).reshape(*index.shape, *[1] * (v.ndim - 1)), v[index], 1e3),
                packed,
            )
            outputs, left = call(rows, parameters, lanes)
            outputs = {
                name: masked(v.reshape(-1, *v.shape[2:])[place], place >= 0) for name, v in outputs.items()
            }
            ends = lanes.ends.reshape(-1)
            # Row DOCUMENTS takes what ends no document.
            at = jnp.where(ends < 0, DOCUMENTS, ends)
            known = jnp.zeros(DOCUMENTS + 1, bool).at[at].set(True)[:-1]
            states = {
                name: jnp.zeros((DOCUMENTS + 1, *v.shape[1:])).at[at].set(v)[:-1] for name, v in left.items()
            }
            return loss(outputs, states, weights), (outputs, states, known)

        (_, found), gradients = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(packed, parameters)
        return found, gradients

    return program


def mixture(rng: np.random.Generator, block: int) -> list[int]:
    """Documents of at most TOKENS tokens: many short ones, one long one, or whole blocks."""
    kind = rng.integers(4)
    left, lengths = int(rng.integers(TOKENS // 2, TOKENS + 1)), []
    if kind == 1:
        lengths.append(int(rng.integers(left // 2, left + 1)))
    while sum(lengths) < left and len(lengths) < DOCUMENTS:
        drawn = int(rng.integers(1, (2 * block, 2 * block, 4 * block, 3)[kind] + 1))
        lengths.append(min(drawn * (block if kind == 3 else 1), left - sum(lengths)))
    return [int(n) for n in rng.permutation(lengths)]


def compared(got, wanted, scales: dict[str, float]) -> dict[str, float]:
    """The largest difference of each leaf, over its largest magnitude or what ``scales`` says."""
    flat = jax.tree_util.tree_flatten_with_path(wanted)[0]
    errors = {}
    for (path, w), g in zip(flat, jax.tree.leaves(got), strict=True):
        assert g.shape == w.shape and np.isfinite(g).all(), path
        name = jax.tree_util.keystr(path, simple=True, separator=" ")
        errors[name] = float(np.abs(g - w).max()) / scales.get(name, max(float(np.abs(w).max()), 1e-3))
    return errors


def traffic(shape: tuple[int, ...], block: int) -> dict:
    """Elements that the collectives of each op's forward and backward pass give, as the compiled programs have them."""
    workers, axis = int(np.prod(shape)), AXES[len(shape)]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:workers]).reshape(shape), axis)
    axis = axis[0] if len(axis) == 1 else axis
    lanes = make_lanes(make_plan([30, 9, 3, 14], PlanConfig(workers, block=block)), extra=1)
    slots = lanes.segment_ids.shape[1] - 1
    packed, parameters = random(np.random.default_rng(0))

    def leaf(v, spec):
        return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=jax.NamedSharding(mesh, spec))

    def abstract(tree, spec):
        return jax.tree.map(lambda v: leaf(v, spec), tree)

    rows = {
        name: tuple(np.zeros((workers * slots, block, *v.shape[1:]), np.float32) for v in values)
        for name, values in packed.items()
    }
    found: dict = {"workers": workers, "slots": slots, "lanes": slots + 1, "block": block}
    for name in ("ssd", "delta", "conv"):
        call = mapped(mesh, axis, [name])
        given = abstract({name: rows[name]}, jax.P(axis)), abstract(parameters, jax.P())
        placed = jax.tree.map(leaf, lanes, lane_specs(axis))
        made = jax.eval_shape(call, *given, placed)
        rounded = jax.tree.map(lambda v: v.update(dtype=jnp.bfloat16), given)
        dtypes = jax.tree.map(lambda v: v.dtype.name, jax.eval_shape(call, *rounded, placed))

        def both(given, lanes, cotangents, call=call):
            outputs, backward = jax.vjp(lambda *arrays: call(*arrays, lanes), *given)
            return outputs, backward(cotangents)

        text = jax.jit(both).lower(given, placed, abstract(made, jax.P(axis))).compile().as_text()
        sizes: dict[str, list[int]] = {}
        for shapes, kind in re.findall(
            r" = (.*?) (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(?:-start)?\(",
            text,
        ):
            dims = re.findall(r"\w+\[([\d,]*)\]", shapes)
            size = sum(int(np.prod([int(n) for n in each.split(",") if n])) for each in dims)
            sizes.setdefault(kind, []).append(size)
        found[name] = {kind: sorted(each) for kind, each in sizes.items()} | {"dtypes": dtypes}
    return found


def placements(workers: int, block: int, mixtures: list[list[int]]) -> list:
    """(lengths, index of the packed token at each place, lanes) of every mixture and strategy, all of equal shapes."""
    configs = [PlanConfig(workers, block=block, strategy=strategy) for strategy in STRATEGIES]
    pairs = [(lengths, config) for lengths in mixtures for config in configs]
    capacity = make_plan(*pairs[0]).capacity
    extra = 0
    for pair in pairs:
        plan = make_plan(*pair, capacity)
        capacity, extra = plan.capacity, max(extra, make_lanes(plan).moved.shape[1])
    plans = [make_plan(*pair, capacity) for pair in pairs]
    return [
        (lengths, layout(plan).index.reshape(-1, block), make_lanes(plan, extra=extra))
        for (lengths, _), plan in zip(pairs, plans)
    ]


def stretches(workers: int, mixtures: list[list[int]]) -> list:
    """The same of the layout in which each worker holds one stretch of the packed documents."""
    share = -(-TOKENS // workers)
    index = np.arange(workers * share).reshape(workers, share)
    return [
        (lengths, np.where(index < sum(lengths), index, -1), contiguous_lanes(lengths, workers, share=share))
        for lengths in mixtures
    ]


def case(shape: tuple[int, ...], block: int, rounds: int, seed: int) -> dict:
    """Errors over ``rounds`` mixtures and all strategies, or in contiguous stretches if ``block`` is 0, in one program."""
    rng = np.random.default_rng([seed, block, *shape])
    workers, axis = int(np.prod(shape)), AXES[len(shape)]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:workers]).reshape(shape), axis)
    axis = axis[0] if len(axis) == 1 else axis
    mixtures = [mixture(rng, block or 5) for _ in range(rounds)]
    placed = placements(workers, block, mixtures) if block else stretches(workers, mixtures)
    traces: list[int] = []
    program = scattered(mesh, axis, traces)
    worst: dict[str, float] = {}
    states = 0
    for lengths, index, lanes in placed:
        packed, parameters = random(rng)
        place = np.full(TOKENS, -1, np.int32)
        place[index[index >= 0]] = np.flatnonzero(index.reshape(-1) >= 0)
        segment_ids = np.zeros(TOKENS, np.int32)
        segment_ids[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        known = np.isin(np.arange(DOCUMENTS), lanes.ends)
        weights = {
            name: rng.normal(size=v.shape).astype(np.float32)
            for name, v in (("ssd", packed["ssd"][0]), ("delta", packed["delta"][2]))
        }
        weights |= {name: rng.normal(size=(TOKENS, D)).astype(np.float32) for name in ("conv", "dynamic")}
        for name, state in STATES.items():
            drawn = rng.normal(size=(DOCUMENTS, *state)).astype(np.float32)
            weights[f"{name} state"] = drawn * known[:, None, None, None]
        wanted = jax.tree.map(np.asarray, alone(packed, parameters, segment_ids, weights))
        (outputs, left, held), gradients = jax.tree.map(
            np.asarray, program(packed, parameters, index, place, lanes, weights)
        )
        np.testing.assert_array_equal(held, known)
        states += int(known.sum())
        (outputs_wanted, left_wanted), gradients_wanted = wanted
        left_wanted = {name: v * known[:, None, None, None] for name, v in left_wanted.items()}
        # A rate's gradient sums a term of either sign for every token, and may be next to nothing.
        A, dt, gradient = parameters["ssd"][0], packed["ssd"][1], gradients_wanted[0]["ssd"][1]
        rates = float((np.abs(gradient * dt).sum(0) / np.abs(A)).max())
        errors = compared(
            {"": outputs, "left": left, "d": gradients[0], "d parameters": gradients[1]},
            {
                "": outputs_wanted,
                "left": left_wanted,
                "d": gradients_wanted[0],
                "d parameters": gradients_wanted[1],
            },
            {"d parameters ssd 0": rates},
        )
        worst = {name: max(error, worst.get(name, 0.0)) for name, error in errors.items()}
    return {
        "workers": workers,
        "plans": len(placed),
        "traces": len(traces),
        "programs": program._cache_size(),
        "extra": lanes.moved.shape[1],
        "slots": len(index) // workers,
        "states": states,
        "errors": worst,
    }


def main() -> None:
    assert jax.device_count() == 8
    wanted = json.loads(sys.argv[1])
    cases = [
        case(tuple(each["shape"]), each["block"], each["rounds"], each["seed"]) for each in wanted["cases"]
    ]
    moved = [traffic(tuple(each["shape"]), each["block"]) for each in wanted["traffic"]]
    print(json.dumps({"cases": cases, "traffic": moved}))


if __name__ == "__main__":
    main()
