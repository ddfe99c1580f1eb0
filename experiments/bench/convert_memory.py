"""Host memory of a conversion: the most that ``jaxllm convert`` holds above an idle interpreter, in both directions.

Command:  python -m experiments.bench.convert_memory [--quick] [--out FILE]
Time:     about two minutes and 5 GB of disk; --quick, a few megabytes, half a minute. Linux only: it reads /proc.
Expected: below the largest shard plus the largest layer, both ways, for a model several times that size.

A sharded Hugging Face folder of random weights (a small Nemotron 3 with experts, bfloat16) becomes a checkpoint of
float32 masters and a Hugging Face folder again, each in a process of its own, whose memory is sampled every few
milliseconds: RssAnon is what the process owns, RssFile what it has mapped from files. The idle interpreter is the same
command on a model of a few kilobytes, so that libraries and compiled programs do not count. The folder that comes back
must hold the same bits.
"""

import argparse
import datetime
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxllm import preset
from jaxllm.cli import machine
from jaxllm.config import ModelConfig, MoEConfig, Precision
from jaxllm.hf import config_to_hf, tensor_names
from jaxllm.hf.tensors import DTYPES, Output, read_headers, write_tensors
from jaxllm.model.functional import abstract_params, flatten

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
FAMILY = "nemotron_h"
# In /proc/PID/status; VmHWM is the system's own peak of their sum.
FIELDS = ("RssAnon", "RssFile", "VmHWM")
INTERVAL = 0.004


def model(width: int, experts: int, vocab: int, repeats: int) -> ModelConfig:
    """A Nemotron 3: mostly experts, some Mamba-2, some attention."""
    tiny = preset("nemotron-3-tiny")
    assert tiny.mamba is not None
    moe = MoEConfig(experts, 4, width, shared_intermediate_size=2 * width, scaling=2.5)
    return tiny.replace(
        hidden_size=width,
        vocab_size=vocab,
        pattern="MEM*E" * repeats,
        moe=moe,
        precision=Precision(param="bfloat16", compute="bfloat16"),
    )


# 1.1 GB, 5 times the bound; for --quick 12 MB, and the smallest for the interpreter alone.
LARGE = model(width=1024, experts=24, vocab=16384, repeats=5), 128 * 2**20
SMALL = model(width=128, experts=24, vocab=1024, repeats=5), 2 * 2**20
TINY = model(width=16, experts=4, vocab=64, repeats=1), 2**30


def write_folder(folder: Path, cfg: ModelConfig, shard_bytes: int) -> Path:
    """A Hugging Face folder of random bfloat16 weights, written tensor by tensor."""
    folder.mkdir(parents=True)
    config = config_to_hf(cfg, FAMILY) | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    own = flatten(abstract_params(cfg))

    def output(number: int, place: Any) -> Output:
        dtype = np.dtype(own[place.path].dtype)
        draw = np.random.default_rng(number).standard_normal
        return Output(place.name, place.shape, dtype, lambda: draw(place.shape, np.float32).astype(dtype))

    places = tensor_names(cfg, FAMILY)
    write_tensors(folder, [output(number, place) for number, place in enumerate(places)], shard_bytes)
    return folder


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of a folder's weights, its largest shard and its largest layer, as they lie on disk."""
    layers: dict[str, int] = {}
    for name, entry in read_headers(folder).items():
        found = re.search(r"layers\.\d+\.", name)
        key = found.group() if found else name
        size = int(np.prod(entry.shape, dtype=np.int64)) * DTYPES[entry.dtype].itemsize
        layers[key] = layers.get(key, 0) + size
    shards = [file.stat().st_size for file in folder.glob("*.safetensors")]
    return {"model": sum(shards), "shards": len(shards), "shard": max(shards), "layer": max(layers.values())}


def digest(folder: Path) -> str:
    """One checksum of all tensors, whatever file each lies in."""
    from safetensors import safe_open

    total = hashlib.sha256()
    for name, entry in sorted(read_headers(folder).items()):
        with safe_open(entry.file, framework="np") as file:
            total.update(f"{name} {entry.dtype} {entry.shape}".encode() + file.get_tensor(name).tobytes())
    return total.hexdigest()


def status(process: int) -> dict[str, int]:
    """Bytes of each of FIELDS; empty when the process has gone."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return {}
    found = re.findall(rf"^({'|'.join(FIELDS)}):\s+(\d+) kB$", text, re.MULTILINE)
    return {name: int(kilobytes) * 1024 for name, kilobytes in found}


def convert(source: Path, target: Path) -> dict[str, Any]:
    """Peaks of one ``jaxllm convert``, in bytes, and its seconds.

    Raises:
        SystemExit: it failed.
    """
    argv = [sys.executable, "-m", "jaxllm.cli.main", "convert", str(source), str(target)]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    begin, peaks = time.perf_counter(), dict.fromkeys(FIELDS, 0)
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(argv, env=environment, stdout=told, stderr=subprocess.STDOUT)
        while process.poll() is None:
            for name, size in status(process.pid).items():
                peaks[name] = max(peaks[name], size)
            time.sleep(INTERVAL)
        if process.returncode:
            told.seek(0)
            raise SystemExit(f"{' '.join(argv)}\n{told.read()[-3000:]}")
    return peaks | {"seconds": time.perf_counter() - begin}


def measure(cfg: ModelConfig, shard_bytes: int, folder: Path) -> dict[str, Any]:
    """Both conversions of one model beside those of the smallest one; figures in bytes."""
    idle_source = write_folder(folder / "idle", TINY[0], TINY[1])
    source = write_folder(folder / "source", cfg, shard_bytes)
    known = sizes(source)
    rows = []
    for direction, given, made in (
        ("Hugging Face to checkpoint", "source", "run"),
        ("checkpoint to Hugging Face", "run", "back"),
    ):
        small = idle_source if given == "source" else folder / "idle-run"
        idle = convert(small, folder / f"idle-{made}")
        peak = convert(folder / given, folder / made)
        rows.append(
            {
                "direction": direction,
                "idle": {name: idle[name] for name in FIELDS},
                "peak": {name: peak[name] for name in FIELDS},
                "above_idle": {name: peak[name] - idle[name] for name in FIELDS},
                "seconds": peak["seconds"],
            }
        )
    bound = known["shard"] + known["layer"]
    same = digest(source) == digest(folder / "back")
    return {"bytes": known | {"bound": bound}, "same_bits": same, "results": rows}


def report(found: dict[str, Any], cfg: ModelConfig, shard_bytes: int) -> dict[str, Any]:
    """The result file's contents."""
    return {
        "command": "python -m experiments.bench.convert_memory",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": {"model": cfg.to_dict(), "max_shard_bytes": shard_bytes, "interval_seconds": INTERVAL},
        "versions": machine.versions(),
        "device": machine.describe(),
        **found,
    }


def show(found: dict[str, Any]) -> None:
    """The figures as a table."""
    known = found["bytes"]
    title = f"{known['model'] / 2**20:.0f} MiB in {known['shards']} shards; bound {known['bound'] / 2**20:.0f} MiB"
    table = Table("MiB above idle", "owned", "mapped files", "resident", "seconds", title=title)
    for row in found["results"]:
        above = (f"{row['above_idle'][name] / 2**20:.0f}" for name in FIELDS)
        table.add_row(row["direction"], *above, f"{row['seconds']:.1f}")
    Console(width=110).print(table)


def main(argv: list[str] | None = None) -> int:
    """Measure; 1 where the bound is missed or a bit has changed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small model; no bound, and no file but --out")
    parser.add_argument("--out", type=Path, help="the result file (default: under experiments/results)")
    options = parser.parse_args(argv)
    cfg, shard_bytes = SMALL if options.quick else LARGE
    with tempfile.TemporaryDirectory() as folder:
        found = measure(cfg, shard_bytes, Path(folder))
    out = options.out or (None if options.quick else RESULTS / "convert_memory.json")
    if out is not None:
        out.write_text(json.dumps(report(found, cfg, shard_bytes), indent=1) + "\n", encoding="utf-8")
    show(found)
    # A model of a few megabytes disappears in what the allocator sets aside.
    worst = 0 if options.quick else max(row["above_idle"]["VmHWM"] for row in found["results"])
    return int(not found["same_bits"] or worst > found["bytes"]["bound"])


if __name__ == "__main__":
    sys.exit(main())
