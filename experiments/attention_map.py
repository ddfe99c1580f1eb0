"""Which tokens each cache policy reads over time, drawn: decode steps downwards, tokens to the right.

Command:  python -m experiments.attention_map [--model FOLDER] [--layer N] [--budget FRACTION] [--quick | --full] [--out FILE]
          Without a folder: the retrieval model by construction.
Time:     not taken on idle cores yet; about a minute, --quick half of that.
Expected: Quest and Pillar follow the spots that dense attention looks at; what evicts has stripes that end or never change.

The first panel is dense attention's probability, the others show what share of the KV heads read a token. Recall is the
share of the dense probability that lies on what was read, with what was evicted counted as lost.
"""

import argparse
import datetime
import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from rich.progress import track

from experiments import _retrieval_model as built
from experiments._long_context_cases import WINDOW, policies
from experiments._long_context_data import Texts
from experiments._long_context_steps import PAGE, Reader, compiled_quickly
from jaxllm import H2O, Policy, Tactic
from jaxllm.cache.policies.base import PolicyState, Seen
from jaxllm.cache.view import View
from jaxllm.cli import machine
from jaxllm.generation.folders import load

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
SIZES = {"quick": (256, 16), "default": (1024, 64), "full": (8192, 128)}
QUICK = ("quest", "pillar", "rkv")


@dataclass
class Log:
    """What the watched policy of one layer did, in numbers of stored tokens, until it is taken.

    Attributes:
        notes: name of a verb to what it gave.
    """

    notes: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)

    def note(self, name: str, *values: Any) -> None:
        """Called by the device."""
        self.notes[name] = tuple(np.asarray(value) for value in values)

    def take(self) -> dict[str, tuple[np.ndarray, ...]]:
        """All notes since the last call."""
        jax.effects_barrier()
        taken, self.notes = self.notes, {}
        return taken


def watched(policy: Policy, log: Log) -> Policy:
    """A policy that does what ``policy`` does, and tells ``log``."""
    base: Any = type(policy)

    class Watched(base):
        def select(self, state: PolicyState, q: Any, view: View) -> Any:
            chosen = super().select(state, q, view)
            if chosen is not None:
                jax.debug.callback(
                    functools.partial(log.note, "select"), chosen.logical[0], chosen.count[0], view.sealed[0]
                )
            return chosen

        def due(self, state: PolicyState, view: View) -> Any:
            rows = super().due(state, view)
            if rows is not None:
                jax.debug.callback(functools.partial(log.note, "due"), rows[0])
            return rows

        def maintain(self, state: PolicyState, view: View, rows: Any) -> Any:
            state, keep = super().maintain(state, view, rows)
            if keep is not None:
                jax.debug.callback(functools.partial(log.note, "keep"), keep.tokens[0], keep.count[0])
            return state, keep

    settings = {each.name: getattr(policy, each.name) for each in fields(policy) if each.init}
    return Watched(**settings)


def probabilities(log: Log) -> Policy:
    """Dense attention that tells ``log`` the probability of every stored token, [K, L]."""

    class Told(Policy):
        wants_mass: ClassVar[bool] = True

        def observe(self, state: PolicyState, view: View, seen: Seen) -> PolicyState:
            if seen.mass is not None:
                jax.debug.callback(functools.partial(log.note, "mass"), seen.mass[0])
            return state

    return Told()


class Positions:
    """Where the tokens that one layer stores stood in the text, for every KV head."""

    def __init__(self, heads: int, length: int):
        self.stored = [np.arange(length) for _ in range(heads)]
        self.next = length

    def append(self) -> None:
        """One more token."""
        self.stored = [np.append(each, self.next) for each in self.stored]
        self.next += 1

    def keep(self, tokens: np.ndarray, count: np.ndarray) -> None:
        """An eviction: ``tokens`` i32[K, m] of which ``count`` stay."""
        self.stored = [each[kept[:count]] for each, kept in zip(self.stored, tokens)]

    def read(self, notes: dict[str, tuple[np.ndarray, ...]], page: int | None) -> list[np.ndarray]:
        """Of every KV head the positions that a step has read, given what its policy noted.

        Args:
            notes: of the step.
            page: tokens of what is selected, or None where single tokens are.
        """
        if "select" not in notes or ("due" in notes and notes["due"][0]):
            return self.stored
        logical, counts, sealed = notes["select"]
        found = []
        for each, chosen, count in zip(self.stored, logical, counts):
            chosen = chosen[:count]
            if page is not None:
                chosen = (chosen[:, None] * page + np.arange(page)).ravel()
            found.append(np.concatenate([each[chosen], each[sealed:]]))
        return found


@dataclass(frozen=True)
class Map:
    """What one policy read.

    Attributes:
        read: f32[steps, tokens], the share of KV heads; of dense attention their mean probability.
        share: mean share of the tokens there were that a step read.
        recall: mean share of the dense probability on what was read.
    """

    read: np.ndarray
    share: float
    recall: float


class Cartographer:
    """One model, one text, one layer.

    Attributes:
        mass: f32[steps, K, tokens], dense attention's probabilities.
    """

    def __init__(self, reader: Reader, context: list[int], given: list[int], layer: int):
        self.reader, self.context, self.given, self.layer = reader, context, given, layer
        attention = reader.cfg.attention
        assert attention is not None
        self._begun: dict[bool, Any] = {}
        log = Log()
        self.mass = np.zeros((len(given), attention.num_kv_heads, len(context) + len(given)), np.float32)
        for step, (notes, _) in enumerate(self._steps(probabilities(log), Policy(), log)):
            self.mass[step] = notes["mass"][0][:, : self.mass.shape[2]]

    def dense(self) -> Map:
        """Of dense attention."""
        return Map(self.mass.mean(axis=1), 1.0, 1.0)

    def map(self, policy: Policy) -> Map:
        """Of ``policy``."""
        log, mine = Log(), policy.at(self.layer)
        page = PAGE if mine.granularity == "page" else None
        heads = self.mass.shape[1]
        read, share, recall = np.zeros_like(self.mass[:, 0]), [], []
        for step, (notes, positions) in enumerate(self._steps(watched(mine, log), policy, log)):
            for head, seen in enumerate(positions.read(notes, page)):
                read[step, seen] += 1 / heads
                recall.append(self.mass[step, head, seen].sum())
            share.append(read[step].sum() / positions.next)
        return Map(read, float(np.mean(share)), float(np.mean(recall)))

    def _steps(
        self, mine: Policy, others: Policy, log: Log
    ) -> Iterator[tuple[dict[str, tuple[np.ndarray, ...]], Positions]]:
        """After each step what was noted, and where the stored tokens stand, its own included, before its eviction."""
        layers = range(self.reader.layers)
        policy = Policy(overrides=tuple((n, mine if n == self.layer else others.at(n)) for n in layers))
        sums = isinstance(others, H2O)
        if sums not in self._begun:
            self._begun[sums] = self.reader.begin(self.context, "compute", len(self.given), sums=sums)
        cache = self.reader.end(self._begun[sums], policy)
        positions = Positions(self.mass.shape[1], len(self.context))
        notes = log.take()
        if "keep" in notes:
            positions.keep(*notes["keep"])
        for step, token in enumerate(self.given):
            _, cache = self.reader.follow(cache, [token], len(self.context) + step)
            notes = log.take()
            positions.append()
            yield notes, positions
            if "keep" in notes:
                positions.keep(*notes["keep"])


def text_of(model: Any, length: int, steps: int) -> tuple[list[int], list[int]]:
    """(context, what is read step by step): questions and answers for the built model, else real text."""
    if model.tokenizer is None:
        sample = built.recall(np.random.default_rng(0), length)
        given = [token for question, answer, _ in sample.questions for token in (*question, *answer)]
        return sample.context, given[:steps]
    sample = Texts(model, length).sample(0)
    question, answer, _ = sample.questions[0]
    return sample.context, [*question, *answer][:steps]


def draw(path: Path, maps: dict[str, Map], title: str) -> None:
    """A panel for each map."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    columns = 3
    lines = -(-len(maps) // columns)
    figure = Figure(figsize=(5.2 * columns, 2.6 * lines + 0.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (name, each) in zip(panels, maps.items()):
        # Fewer columns than a panel has pixels, so that none is skipped: a column shows the most of its tokens.
        wide = -(-each.read.shape[1] // 256)
        padded = np.pad(each.read, ((0, 0), (0, -each.read.shape[1] % wide)))
        shown = padded.reshape(len(padded), -1, wide).max(axis=2)
        options: dict[str, Any] = {"vmin": 0, "vmax": 1}
        if name == "dense":
            shown, options = np.maximum(shown, 1e-4), {"norm": LogNorm(1e-4, 1)}
        extent = (0, each.read.shape[1], len(each.read), 0)
        image = axes.imshow(
            shown, aspect="auto", cmap="magma", interpolation="nearest", extent=extent, **options
        )
        label = "probability, mean of the KV heads" if name == "dense" else "share of the KV heads"
        figure.colorbar(image, ax=axes, pad=0.01).set_label(label, fontsize=7)
        axes.set_title(f"{name}: reads {each.share:.1%}, recall {each.recall:.1%}", fontsize=9)
        axes.set(xlabel="token", ylabel="step")
    for axes in panels[len(maps) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """Draw; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a folder that jaxllm.load takes")
    parser.add_argument("--layer", type=int, help="attention layer, from 0 (the last)")
    parser.add_argument("--budget", type=float, default=1 / 16, help="fraction of the tokens (1/16)")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--quick", action="store_true", help="a short text, few policies; no result file but --out"
    )
    sizes.add_argument("--full", action="store_true", help="a long text")
    parser.add_argument("--out", type=Path, help="the picture (experiments/results/attention_map.png)")
    options = parser.parse_args(argv)
    model = built.retrieval_model() if options.model is None else load(options.model)
    length, steps = SIZES["quick" if options.quick else "full" if options.full else "default"]
    reader = Reader(model)
    layer = reader.layers - 1 if options.layer is None else options.layer
    with compiled_quickly(options.quick):
        maker = Cartographer(reader, *text_of(model, length, steps), layer)
        chosen = policies(options.budget, maker.mass.shape[2], reader.layers) | {"tactic": Tactic()}
        names = QUICK if options.quick else tuple(name for name in chosen if name != WINDOW)
        maps = {"dense": maker.dense()}
        for name in track(names, "policies"):
            maps[name] = maker.map(chosen[name])
    folder = ROOT / "runs" if options.quick else RESULTS
    out = options.out or folder / "attention_map.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    name = "by construction" if options.model is None else options.model.name
    draw(out, maps, f"{name}, attention layer {layer}: {length:,} tokens before, budget {options.budget:.3g}")
    report = {
        "command": "python -m experiments.attention_map",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": {
            "model": name,
            "layer": layer,
            "context": length,
            "steps": steps,
            "budget": options.budget,
        },
        "versions": machine.versions(),
        "device": machine.describe(),
        "policies": {name: {"read": each.share, "recall": each.recall} for name, each in maps.items()},
    }
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, each in maps.items():
        print(f"{name}: reads {each.share:.1%} of the tokens and {each.recall:.1%} of the probability")
    return 0


if __name__ == "__main__":
    sys.exit(main())
