"""The tables of ``bench/fcp_pair.py``: ratios on two processes, and what they were predicted from."""

from typing import Any

RATIOS = ("batch", "steps", "simulator", "tiles", "measured", "quartiles", "error of the simulator")
CONSTANTS = ("measured beforehand", "forward", "backward")


def ratios(data: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line of ``RATIOS`` for each batch and strategy beside FCP."""
    found = []
    for name, batch in data["batches"].items():
        for kind, ratio in batch["over_fcp"].items():
            measured = ratio["measured"]
            found.append(
                (
                    name,
                    f"{kind} over fcp",
                    *(f"{x:.2f}" for x in (ratio["predicted"], ratio["by_tiles"], measured["median"])),
                    f"{measured['low']:.2f} to {measured['high']:.2f}",
                    f"{ratio['error']:+.0%}: {ratio['verdict']}",
                )
            )
    return found


def constants(data: dict[str, Any]) -> list[tuple[str, ...]]:
    """Lines of ``CONSTANTS``."""
    phases = [data["machine"][name] for name in ("forward", "backward")]
    queries, keys = data["inputs"]["tile"]
    told = (
        ("GFLOP/s that long chunks reach", "flops", 1e-9, 1),
        ("tokens of the curve", "tokens", 1, 0),
        (f"ms of a tile of {queries} queries and {keys} keys", "tile", 1e3, 3),
        ("time while the other core computes, over alone", "crowding", 1, 2),
    )
    return [
        (label, *(f"{phase[key] * unit:,.{digits}f}" for phase in phases))
        for label, key, unit, digits in told
    ]


def steps(data: dict[str, Any]) -> str:
    """What the figures are of, how exact gradients are, and what travels."""
    every = [step for batch in data["batches"].values() for step in batch["steps"].values()]
    taken = [step["measured"]["median"] for step in every]
    worst = max(max(step["gradient_error"], step["loss_error"]) for step in every)
    share = max(step["predicted"]["transfers"] / step["predicted"]["simulator"] for step in every)
    return (
        f"Steps of {min(taken):.1f} to {max(taken):.1f} s, medians of {data['inputs']['rounds']} turns; losses and gradients "
        f"within {worst:.0e} of one process. Transfers, {data['machine']['bandwidth'] / 1e9:.1f} GB/s each way after "
        f"{data['machine']['latency'] * 1e6:.0f} us, are at most {share:.1%} of a step. Predicted at "
        f"{data['predicted_at']}, measured until {data['measured_at']} on: {data['device']['cpu']}, JAX "
        f"{data['versions']['jax']}."
    )
