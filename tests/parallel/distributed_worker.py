"""One of several processes that train together: ``distributed_worker.py MESH STEPS FOLDER PATTERN [packed]``, launched by
the environment.

Prints the losses of every step; FOLDER takes checkpoints, and the last one is read back onto another mesh. ``packed`` is
documents of a corpus instead of rows that are all alike, and prints how many tokens were read of it.
"""

import os
import sys
from dataclasses import replace

from parallel.distributed import agreed, start

launch = start(os.environ)

import jax  # noqa: E402
import numpy as np  # noqa: E402

from jaxllm.batch import PackedBatch  # noqa: E402
from jaxllm.data.loader import Loader  # noqa: E402
from jaxllm.data.tokens import TokenCorpus  # noqa: E402
from jaxllm.train.checkpoint import Checkpoints  # noqa: E402
from jaxllm.train.context import ContextSettings  # noqa: E402
from jaxllm.train.events import StepEvent  # noqa: E402
from jaxllm.train.placement import placement, state_shardings  # noqa: E402
from jaxllm.train.settings import TrainSettings  # noqa: E402
from jaxllm.train.state import abstract_state  # noqa: E402
from jaxllm.train.step import StepSettings  # noqa: E402
from jaxllm.train.trainer import fit  # noqa: E402
from parallel.mesh import MeshShape, make_mesh, row_share  # noqa: E402
from tests.train.tiny import TinyLoader, constant_lr, tiny_config  # noqa: E402

ROWS = 8


class Slice(TinyLoader):
    """This process's slice of each batch."""

    def __init__(self, index: int, count: int):
        super().__init__(ROWS)
        self.own = slice(index * ROWS // count, (index + 1) * ROWS // count)

    def __next__(self) -> PackedBatch:
        return jax.tree.map(lambda x: x[self.own], super().__next__())


class Counted(np.ndarray):
    """Tokens that count how often one of them is read."""

    read = 0

    def __getitem__(self, at):
        found = np.asarray(self).__getitem__(at)
        Counted.read += np.size(found)
        return found


def packed(index: int, count: int) -> Loader:
    """Rows of documents shorter and longer than a device's share of them."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(2.5, 1.2, 400)).astype(int) + 1
    corpus = TokenCorpus.from_documents([rng.integers(0, 62, n) for n in lengths], 62)
    corpus = replace(corpus, tokens=corpus.tokens.view(Counted))
    return Loader(corpus, ROWS, 48, process_index=index, process_count=count)


def main() -> None:
    sizes = {name: int(size) for name, size in (part.split("=") for part in sys.argv[1].split(","))}
    shape, steps, folder = MeshShape(**sizes), int(sys.argv[2]), sys.argv[3]
    cfg, optim = tiny_config(sys.argv[4], vocab_size=62), constant_lr()
    assert agreed(jax.process_index(), 7) == (jax.process_count() - 1, 7)
    loader = (packed if "packed" in sys.argv else Slice)(*row_share(make_mesh(shape)))
    Counted.read = 0
    losses = []
    settings = TrainSettings(
        steps=steps,
        mesh=shape,
        context=ContextSettings(block=8, stage_rounds=4),
        save_seconds=None,
        step=StepSettings(loss_chunk=64),
        save_every=steps // 2,
    )
    watch = [lambda e: losses.append(e.loss) if isinstance(e, StepEvent) else None]
    fit(cfg, optim, loader, settings, folder=folder, callbacks=watch)
    print("READ", Counted.read)
    print("LOSSES", *[f"{loss:.9g}" for loss in losses])
    place = placement(cfg, MeshShape(data=shape.size))
    where = None if place is None else state_shardings(cfg, optim, place)
    target = abstract_state(cfg, optim)
    if where is not None:
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), target, where)
    with Checkpoints(os.path.join(folder, "checkpoints")) as saved:
        found = saved.restore_latest(target, cfg)
    assert found is not None and found.step == steps
    total = sum(float(np.abs(np.asarray(x.addressable_data(0))).sum()) for x in jax.tree.leaves(found.state))
    print("STATE", repr(total))


main()
