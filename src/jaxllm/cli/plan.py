"""``jaxllm plan``: how a batch's documents lie on the workers of context parallelism, without a device."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from tyro.conf import Positional

from jaxllm.cli.display import count, duration, make_console, short, table
from jaxllm.cli.errors import UserError
from parallel.context.placement import Strategy

if TYPE_CHECKING:
    import numpy as np

    from parallel.context import Plan


@dataclass(frozen=True)
class Args:
    """Plan context parallelism for one batch: balance figures and a picture of the placement.

    Attributes:
        lengths: a file of document lengths (whole numbers, any white space between), or a published distribution:
            log-normal, magiattention.
        workers: devices that share the batch.
        block: tokens of a block.
        strategy: who holds which block; fcp and fcp-pairs balance memory and work.
        tokens: of the batch that is drawn from a distribution; 4096 * 8 for each worker if left out.
        seed: of the draw.
        node: workers of a node, numbered one after the other; 0: all in one.
        slowdown: time of a block between nodes over its time inside one.
        window: keys that a query of the model's widest attention sees, itself included (1 for a model without attention);
            left out: all before it in its document.
        out: the picture, a PNG.
        json: print the figures as JSON.
    """

    lengths: Positional[str]
    workers: int = 8
    block: int = 4096
    strategy: Strategy = "fcp"
    tokens: int | None = None
    seed: int = 0
    node: int = 0
    slowdown: float = 9.0
    window: int | None = None
    out: Path = Path("plan.png")
    json: bool = False

    def check(self) -> None:
        """Raise UserError for figures that cannot be."""
        for name, least in (("workers", 1), ("block", 1), ("node", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name}", getattr(self, name), f"a whole number of at least {least}")
        for name in ("tokens", "window"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise UserError(f"--{name}", given, "a whole number of at least 1")
        if not self.slowdown > 0:
            raise UserError("--slowdown", self.slowdown, "a number above 0")
        if self.out.suffix.lower() != ".png":
            raise UserError("--out", str(self.out), "a file whose name ends in .png")


def read_lengths(args: Args) -> "np.ndarray":
    """Document lengths as the arguments ask for them.

    Raises:
        UserError: neither a distribution nor a file, or a file that holds anything but whole numbers of at least 1.
    """
    import numpy as np

    from parallel.context import DISTRIBUTIONS, draw_lengths

    if args.lengths in DISTRIBUTIONS:
        return draw_lengths(args.lengths, args.tokens or 8 * 4096 * args.workers, args.seed)
    path = Path(args.lengths)
    names = ", ".join(DISTRIBUTIONS)
    if not path.is_file():
        raise UserError("lengths", args.lengths, f"a file of document lengths, or one of {names}")
    if args.tokens is not None:
        raise UserError("--tokens", args.tokens, f"only with a distribution ({names}); a file says it itself")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        for word in line.split():
            if not (word.isascii() and word.isdecimal() and 0 < int(word) < 2**31):
                raise UserError(f"{path}:{number}", word, "a document's tokens, a whole number of at least 1")
            found.append(int(word))
    if not found:
        raise UserError(
            "lengths", args.lengths, "a file with at least one document length; this one is empty"
        )
    return np.asarray(found, np.int64)


def examine(plan: "Plan", seconds: float) -> dict[str, Any]:
    """Everything that plan prints, as plain JSON values."""
    return {
        "documents": int(plan.blocks.document[-1]) + 1,
        "tokens": plan.blocks.tokens,
        "blocks": len(plan.blocks),
        "capacity": asdict(plan.capacity),
        "balance": asdict(plan.balance),
        "seconds": seconds,
    }


def _show(args: Args, report: dict[str, Any], console: Console) -> None:
    balance, capacity = report["balance"], report["capacity"]
    made = table(f"{args.strategy} on {args.workers} workers", "", right=(1,))
    made.add_row("documents", f"{count(report['documents'])} of {short(report['tokens'])} tokens")
    made.add_row("blocks", f"{count(report['blocks'])} of up to {count(args.block)} tokens")
    made.add_row("slots of a worker", f"{capacity['slots']} ({balance['padding']:.1%} padding)")
    made.add_row("busiest worker / its due", f"{balance['work']:.3f}")
    made.add_row("busiest worker / mean", f"{balance['work_over_mean']:.3f}")
    made.add_row("tokens off the mean", f"{balance['tokens']:.2f} blocks at most")
    made.add_row("(query, key) pairs of blocks", count(balance["pairs"]))
    made.add_row(
        "transfers", f"{count(balance['transfers'])} blocks ({balance['received']:.1f} for each worker)"
    )
    if args.node:
        made.add_row("between nodes", f"{balance['crossing']:.1%}")
    made.add_row("rounds", f"{count(balance['rounds'])} (busiest link: {count(balance['degree'])} blocks)")
    if args.node:
        made.add_row("time of the rounds", f"{balance['cost']:,.0f} blocks inside a node")
    made.add_row("planned in", duration(report["seconds"]))
    console.print(made)
    console.print(f"Placement: {args.out}")


def run(args: Args) -> int:
    """Print the figures and draw the placement."""
    args.check()
    lengths = read_lengths(args)
    from time import perf_counter

    from parallel.context import Links, PlanConfig, make_plan

    links = Links(node=args.node, between=args.slowdown)
    config = PlanConfig(args.workers, args.block, args.strategy, links=links, window=args.window)
    begin = perf_counter()
    plan = make_plan(lengths, config)
    seconds = perf_counter() - begin
    from jaxllm.cli.plan_picture import draw

    draw(args.out, plan, title=f"{args.strategy}: {plan.blocks.tokens:,} tokens on {args.workers} workers")
    report = {"strategy": args.strategy, **examine(plan, seconds), "picture": str(args.out)}
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _show(args, report, make_console())
    return 0
