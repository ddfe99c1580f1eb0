"""Memory of one SSD layer over a long text: in one call, and in stretches that hand their state on.

Command:  python -m experiments.bench.ssd_memory [--quick] [--out FILE]
Time:     a few minutes and 5 GB of memory; --quick, short texts, half a minute. Linux only: it reads /proc.
Expected: in stretches the same temporaries at 65,536 and at 1,048,576 tokens (exit code 1 otherwise); one call grows with
          the text.

One layer of 4 heads, 1 group, P = 64, N = 128, float32, forward. Inputs and outputs grow with the text in any case and are
not counted. ``temporaries`` is what the compiled program sets aside beside them; ``extra`` is what the process was seen to
hold while it ran, above what it held with its inputs in place, less the outputs; each run is a process of its own. One
call keeps the states of all chunks at once (``chunk_states``) and several arrays of the size of its inputs; at the full
length it is compiled, not run. Stretches are the same op: the final state of one is the initial state of the next.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from jaxllm.cli import machine
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
SHAPES = {"x": (H, P), "dt": (H,), "B": (G, N), "C": (G, N)}


def one_call(arrays: dict[str, Array], A: Array) -> tuple[Array, Array]:
    """y [1, T, H, P] and the final state [1, 1, H, P, N]."""
    x, dt, B, C = (arrays[name] for name in SHAPES)
    y, state = ssd(x, dt, A, B, C, num_segments=1, chunk_size=CHUNK, implementation="xla")
    assert state is not None
    return y, state


def in_stretches(arrays: dict[str, Array], A: Array, *, stretch: int = STRETCH) -> tuple[Array, Array]:
    """The same, ``stretch`` tokens at a time."""
    tokens = arrays["x"].shape[1]

    def step(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        y, state = carry
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=index * stretch, slice_size=stretch, axis=1)
        x, dt, B, C = (cut(arrays[name]) for name in SHAPES)
        out, after = ssd(x, dt, A, B, C, initial_state=state, chunk_size=CHUNK, implementation="xla")
        assert after is not None
        return jax.lax.dynamic_update_slice_in_dim(y, out, index * stretch, axis=1), after

    start = jnp.zeros((1, tokens, H, P)), jnp.zeros((1, 1, H, P, N))
    return jax.lax.fori_loop(0, tokens // stretch, step, start)


FORMS = {"one call": one_call, "stretches": in_stretches}


def inputs(tokens: int) -> dict[str, Array]:
    """Numbers of all phases, made in place: nothing of their size beside them."""

    def wave(number: int, shape: tuple[int, ...]) -> Array:
        position = jax.lax.broadcasted_iota(jnp.float32, (1, tokens, *shape), 1)
        channel = jax.lax.broadcasted_iota(jnp.float32, (1, tokens, *shape), len(shape) + 1)
        v = jnp.sin(0.37 * (number + 1) * position + channel)
        return 0.05 * (1 + v) if shape == (H,) else v

    make = jax.jit(lambda: {name: wave(n, shape) for n, (name, shape) in enumerate(SHAPES.items())})
    return jax.block_until_ready(make())


def memory(field: str) -> int:
    """Bytes of this process: "VmRSS", now, or "VmHWM", the most since :func:`forget_peak`."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    """VmHWM counts from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def child(form: str, tokens: int) -> dict[str, Any]:
    """What one form needs for so many tokens, in this process; figures in bytes."""
    avals = {name: jax.ShapeDtypeStruct((1, tokens, *shape), jnp.float32) for name, shape in SHAPES.items()}
    A = -jnp.linspace(0.1, 2.0, H)
    call = jax.jit(FORMS[form]).lower(avals, A).compile()
    held = call.memory_analysis()
    assert held is not None
    found = {
        "form": form,
        "tokens": tokens,
        "inputs": held.argument_size_in_bytes,
        "outputs": held.output_size_in_bytes,
        "temporaries": held.temp_size_in_bytes,
        "chunk_states": tokens // CHUNK * H * P * N * 4,
        "extra": None,
    }
    if form == "one call" and tokens > MOST_IN_ONE_CALL:
        return found
    arrays = inputs(tokens)
    forget_peak()
    before = memory("VmRSS")
    y, state = jax.block_until_ready(call(arrays, A))
    found["extra"] = memory("VmHWM") - before - held.output_size_in_bytes
    if not (bool(jnp.isfinite(jnp.sum(y))) and bool(jnp.isfinite(jnp.sum(state)))):
        raise SystemExit(f"{form} over {tokens} tokens is not finite")
    return found


def measure(lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Every form at every length, each in a process of its own.

    Raises:
        SystemExit: one failed.
    """
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    rows = []
    for form in FORMS:
        for tokens in lengths:
            argv = [sys.executable, "-m", "experiments.bench.ssd_memory", "--child", form, str(tokens)]
            done = subprocess.run(argv, env=environment, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(argv)}\n{done.stderr[-3000:]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The figures as a table."""
    names = ("inputs", "outputs", "chunk_states", "temporaries", "extra")
    table = Table("form", "tokens", *names, title="MiB")
    for row in rows:
        mib = ("not run" if row[name] is None else f"{row[name] / 2**20:.1f}" for name in names)
        table.add_row(row["form"], str(row["tokens"]), *mib)
    Console(width=110).print(table)


def constant(rows: list[dict[str, Any]]) -> bool:
    """Whether stretches take the same temporaries at every length."""
    return len({row["temporaries"] for row in rows if row["form"] == "stretches"}) == 1


def main(argv: list[str] | None = None) -> int:
    """Measure; 1 where the stretches' memory grows with the text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="short texts, and no file but --out")
    parser.add_argument("--out", type=Path, help="the result file (default: under experiments/results)")
    parser.add_argument("--child", nargs=2, metavar=("FORM", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(child(options.child[0], int(options.child[1]))))
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
