"""Memory of one recurrent layer over a long text: in one call, and in stretches that hand their state on.

Command:  python -m experiments.bench.ssd_memory [--quick] [--out FILE]
Time:     a quarter of an hour and 8 GB of memory; --quick, short texts, a minute. Linux only: it reads /proc.
Expected: forward in stretches the same temporaries at 65,536 and at 1,048,576 tokens, and gradients in stretches no more
          beside one state for each of them (exit code 1 otherwise); one call grows with the text.

One layer of SSD of 4 heads, 1 group, P = 64, N = 128, and one of the gated delta rule with states of the same size (1 head of
128 key channels, 4 of 64 value channels), float32. Inputs and outputs (of "gradients", those of all inputs that have tokens)
grow with the text in any case and are not counted. ``temporaries`` is what the compiled program sets aside beside them;
``extra`` is what the process was seen to hold while it ran, above what it held with its inputs in place, less the outputs;
each run is a process of its own. One call keeps the states of all chunks at once (``chunk_states``) and several arrays of
the size of its inputs; at the full length it is compiled, not run. Stretches are the same op: the final state of one is the
initial state of the next. Their gradients keep the state before each stretch and make the rest anew.
"""

import argparse
import datetime
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from jaxllm.cli import machine
from pallas_kernels.gated_delta import gated_delta
from pallas_kernels.ssd import ssd

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
H, G, P, N = 4, 1, 64, 128
# Tokens of a chunk: what "xla" takes at most, so that ``chunk_states`` is what it keeps.
CHUNK = 64
STRETCH = 8192
LENGTHS = (2**16, 2**20)
QUICK = (2**14, 2**15)
# Above this a single call is compiled and not run.
MOST_IN_ONE_CALL = 2**16
STATE_BYTES = 4 * H * P * N
# States that a form may keep for each stretch.
KEPT_STATES = {"gradients, stretches": 1}
Arrays = dict[str, Array]


def _ssd(arrays: Arrays, state: Array) -> tuple[Array, Array]:
    A = -jnp.linspace(0.1, 2.0, H)
    x, dt, B, C = (arrays[name] for name in ("x", "dt", "B", "C"))
    y, after = ssd(x, dt, A, B, C, initial_state=state, chunk_size=CHUNK, implementation="xla")
    assert after is not None
    return y, after


def _gated_delta(arrays: Arrays, state: Array) -> tuple[Array, Array]:
    q, k, v, g, beta = (arrays[name] for name in ("q", "k", "v", "g", "beta"))
    o, after = gated_delta(
        q, k / N**0.5, v, -g, beta, initial_state=state, chunk_size=CHUNK, implementation="xla"
    )
    assert after is not None
    return o, after


@dataclass(frozen=True)
class Layer:
    """A layer whose outputs are [1, T, H, P].

    Attributes:
        call: outputs and the state after them, of arrays [1, T, ...] and the state before them.
        shapes: of what a token has.
        state: shape of the state.
    """

    call: Callable[[Arrays, Array], tuple[Array, Array]]
    shapes: dict[str, tuple[int, ...]]
    state: tuple[int, ...]

    def start(self) -> Array:
        return jnp.zeros((1, 1, *self.state))


LAYERS = {
    "ssd": Layer(_ssd, {"x": (H, P), "dt": (H,), "B": (G, N), "C": (G, N)}, (H, P, N)),
    "gated_delta": Layer(
        _gated_delta,
        {"q": (G, N), "k": (G, N), "v": (H, P), "g": (H,), "beta": (H,)},
        (H, N, P),
    ),
}


def one_call(layer: Layer, arrays: Arrays) -> tuple[Array, Array]:
    """Outputs [1, T, H, P] and the final state."""
    return layer.call(arrays, layer.start())


def _cut(arrays: Arrays, index: Any, stretch: int) -> Arrays:
    """The tokens of one stretch."""
    cut = partial(jax.lax.dynamic_slice_in_dim, start_index=index * stretch, slice_size=stretch, axis=1)
    return {name: cut(a) for name, a in arrays.items()}


def _tokens(arrays: Arrays) -> int:
    return next(iter(arrays.values())).shape[1]


def in_stretches(layer: Layer, arrays: Arrays, *, stretch: int = STRETCH) -> tuple[Array, Array]:
    """The same, ``stretch`` tokens at a time."""

    def step(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        y, state = carry
        out, after = layer.call(_cut(arrays, index, stretch), state)
        return jax.lax.dynamic_update_slice_in_dim(y, out, index * stretch, axis=1), after

    y = jnp.zeros((1, _tokens(arrays), H, P))
    return jax.lax.fori_loop(0, _tokens(arrays) // stretch, step, (y, layer.start()))


def gradients(layer: Layer, arrays: Arrays) -> Arrays:
    """Of the sum of the squares of the outputs, by every array."""
    return jax.grad(lambda arrays: jnp.sum(jnp.square(one_call(layer, arrays)[0])))(arrays)


def gradients_in_stretches(layer: Layer, arrays: Arrays, *, stretch: int = STRETCH) -> Arrays:
    """The same; of a stretch only the state before it is kept."""
    count = _tokens(arrays) // stretch

    def forward(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        states, state = carry
        after = layer.call(_cut(arrays, index, stretch), state)[1]
        return jax.lax.dynamic_update_index_in_dim(states, state, index, 0), after

    start = layer.start()
    states, last = jax.lax.fori_loop(0, count, forward, (jnp.zeros((count, *start.shape)), start))

    def backward(back: Array, carry: tuple[Arrays, Array]) -> tuple[Arrays, Array]:
        found, dstate = carry
        index = count - 1 - back
        (out, _), pull = jax.vjp(layer.call, _cut(arrays, index, stretch), states[index])
        dsome, dstate = pull((2 * out, dstate))
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=index * stretch, axis=1)
        return {name: put(found[name], dsome[name]) for name in found}, dstate

    zeros = jax.tree.map(jnp.zeros_like, (arrays, last))
    return jax.lax.fori_loop(0, count, backward, zeros)[0]


FORMS: dict[str, Callable[[Layer, Arrays], Any]] = {
    "one call": one_call,
    "stretches": in_stretches,
    "gradients, one call": gradients,
    "gradients, stretches": gradients_in_stretches,
}


def inputs(layer: Layer, tokens: int) -> Arrays:
    """Numbers of all phases, those of (H,) from 0 to 0.1, made in place: nothing of their size beside them."""

    def wave(number: int, shape: tuple[int, ...]) -> Array:
        position = jax.lax.broadcasted_iota(jnp.float32, (1, tokens, *shape), 1)
        channel = jax.lax.broadcasted_iota(jnp.float32, (1, tokens, *shape), len(shape) + 1)
        v = jnp.sin(0.37 * (number + 1) * position + channel)
        return 0.05 * (1 + v) if shape == (H,) else v

    make = jax.jit(lambda: {name: wave(n, shape) for n, (name, shape) in enumerate(layer.shapes.items())})
    return jax.block_until_ready(make())


def memory(field: str) -> int:
    """Bytes of this process: "VmRSS", now, or "VmHWM", the most since :func:`forget_peak`."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    """VmHWM counts from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def child(op: str, form: str, tokens: int) -> dict[str, Any]:
    """What one form needs for so many tokens, in this process; figures in bytes."""
    layer = LAYERS[op]
    avals = {
        name: jax.ShapeDtypeStruct((1, tokens, *shape), jnp.float32) for name, shape in layer.shapes.items()
    }
    call = jax.jit(partial(FORMS[form], layer)).lower(avals).compile()
    held = call.memory_analysis()
    assert held is not None
    found = {
        "op": op,
        "form": form,
        "tokens": tokens,
        "inputs": held.argument_size_in_bytes,
        "outputs": held.output_size_in_bytes,
        "temporaries": held.temp_size_in_bytes,
        "chunk_states": tokens // CHUNK * STATE_BYTES,
        "extra": None,
    }
    if "one call" in form and tokens > MOST_IN_ONE_CALL:
        return found
    arrays = inputs(layer, tokens)
    forget_peak()
    before = memory("VmRSS")
    out = jax.block_until_ready(call(arrays))
    found["extra"] = memory("VmHWM") - before - held.output_size_in_bytes
    if not all(bool(jnp.isfinite(jnp.sum(leaf))) for leaf in jax.tree.leaves(out)):
        raise SystemExit(f"{op}, {form}, over {tokens} tokens is not finite")
    return found


def measure(lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Every form of every layer at every length, each in a process of its own.

    Raises:
        SystemExit: one failed.
    """
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    rows = []
    for op, form, tokens in itertools.product(LAYERS, FORMS, lengths):
        argv = [sys.executable, "-m", "experiments.bench.ssd_memory", "--child", op, form, str(tokens)]
        done = subprocess.run(argv, env=environment, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(argv)}\n{done.stderr[-3000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The figures as a table."""
    names = ("inputs", "outputs", "chunk_states", "temporaries", "extra")
    table = Table("op", "form", "tokens", *names, title="MiB")
    for row in rows:
        mib = ("not run" if row[name] is None else f"{row[name] / 2**20:.1f}" for name in names)
        table.add_row(row["op"], row["form"], str(row["tokens"]), *mib)
    Console(width=110).print(table)


def constant(rows: list[dict[str, Any]]) -> bool:
    """Whether stretches take the same temporaries at every length, their gradients but for the states between them."""

    def beside_states(row: dict[str, Any]) -> int:
        return row["temporaries"] - KEPT_STATES.get(row["form"], 0) * row["tokens"] // STRETCH * STATE_BYTES

    steady = [row for row in rows if "stretches" in row["form"]]
    least: dict[tuple[str, str], int] = {}
    for row in steady:
        key = row["op"], row["form"]
        least[key] = min(least.get(key, row["temporaries"]), row["temporaries"])
    return all(beside_states(row) <= least[row["op"], row["form"]] for row in steady)


def main(argv: list[str] | None = None) -> int:
    """Measure; 1 where the stretches' memory grows with the text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="short texts, and no file but --out")
    parser.add_argument("--out", type=Path, help="the result file (default: under experiments/results)")
    parser.add_argument("--child", nargs=3, metavar=("OP", "FORM", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(child(*options.child[:2], int(options.child[2]))))
        return 0
    rows = measure(QUICK if options.quick else LENGTHS)
    out = options.out or (None if options.quick else RESULTS / "ssd_memory.json")
    if out is not None:
        report = {
            "command": "python -m experiments.bench.ssd_memory",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "inputs": {"heads": H, "groups": G, "P": P, "N": N, "stretch": STRETCH, "chunk": CHUNK},
            "versions": machine.versions(),
            "device": machine.describe(),
            "results": rows,
        }
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(rows)
    return int(not constant(rows))


if __name__ == "__main__":
    sys.exit(main())
