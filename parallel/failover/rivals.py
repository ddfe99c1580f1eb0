"""Other systems that keep training when workers fail, as far as their arithmetic goes."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from parallel.failover.recovery import Cluster, Pace, Recovery
from parallel.failover.schedule import HEALTHY, Stage, pipeline_units

# Two stages in full.
DOUBLE = Stage(2 * HEALTHY.forward, 2 * HEALTHY.backward)


@dataclass(frozen=True)
class Bamboo(Recovery):
    """Redundant computing in the manner of Bamboo (NSDI'23): a stage always runs its successor's forward pass as well.

    When the successor dies it runs the backward pass too. A replica in which two neighbours have died trains nothing.

    Attributes:
        redundant: units of forward passes that every stage pays always, for a micro-batch.
        takeover: of a stage that stands in for its successor.
    """

    redundant: float = 1.0
    takeover: Stage = DOUBLE

    def pace(self, cluster: Cluster, down: frozenset[int]) -> Pace | None:
        extra = self.redundant if cluster.stages > 1 else 0.0
        normal = Stage(HEALTHY.forward + extra, HEALTHY.backward)
        slowest, whole, helped = 0.0, cluster.replicas, 0
        for dead in cluster.dead(down).values():
            whole -= 1
            # The first stage is covered by the last one, as in a ring.
            covering = {(stage - 1) % cluster.stages for stage in dead}
            if covering & dead:
                continue
            living = [stage for stage in range(cluster.stages) if stage not in dead]
            stages = [self.takeover if stage in covering else normal for stage in living]
            slowest = max(slowest, cluster.pipeline(stages))
            helped += 1
        if not whole + helped:
            return None
        if whole:
            slowest = max(slowest, cluster.pipeline([normal] * cluster.stages))
        return Pace(cluster.step(slowest), (whole + helped) / cluster.replicas)


@dataclass(frozen=True)
class Oobleck(Recovery):
    """Pipeline templates in the manner of Oobleck (SOSP'23): a replica that lost nodes goes on as a shorter pipeline.

    Layers are dealt anew over its nodes, as evenly as whole layers can be; micro-batches of the batch go to pipelines so
    that the last one is done as early as can be. A pipeline with fewer nodes than ``least`` borrows from the longest one
    that can spare some, or is given up and its nodes lengthen others.

    Attributes:
        layers: of the model, at least as many as stages.
        least: nodes that hold the model.
    """

    layers: int = 32
    least: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "least"):
            if getattr(self, name) < 1:
                raise ValueError(f"oobleck {name}={getattr(self, name)}: must be at least 1")

    def pace(self, cluster: Cluster, down: frozenset[int]) -> Pace | None:
        if self.layers < cluster.stages or self.least > cluster.stages:
            raise ValueError(
                f"oobleck layers={self.layers}, least={self.least}: stages={cluster.stages} must be at most the first "
                "and at least the second"
            )
        lengths = self.templates(cluster, down)
        if not lengths:
            return None
        items = cluster.replicas * cluster.micro
        ends = _dealt(cluster, self.layers, tuple(lengths), items)
        healthy = _dealt(cluster, self.layers, (cluster.stages,) * cluster.replicas, items)
        # Stages of a healthy pipeline may be uneven too: that is no matter of failures.
        return Pace(cluster.step(cluster.units * ends / healthy))

    def templates(self, cluster: Cluster, down: frozenset[int]) -> list[int]:
        """Nodes of each pipeline, longest first."""
        dead = cluster.dead(down)
        lengths = sorted(cluster.stages - len(dead.get(replica, ())) for replica in range(cluster.replicas))
        while lengths and lengths[0] < self.least:
            if lengths[-1] > self.least:
                lengths[-1] -= 1
                lengths[0] += 1
            else:
                left = lengths.pop(0)
                for index in range(len(lengths)):
                    more = min(left, cluster.stages - lengths[index])
                    lengths[index] += more
                    left -= more
            lengths.sort()
        return lengths[::-1]


def _stages(cluster: Cluster, layers: int, nodes: int) -> tuple[Stage, ...]:
    """All layers over some nodes; the first ones have one more where they do not share them equally."""
    layer = cluster.stages / layers
    counts = [layers // nodes + (node < layers % nodes) for node in range(nodes)]
    return tuple(Stage(count * layer * HEALTHY.forward, count * layer * HEALTHY.backward) for count in counts)


@lru_cache(65536)
def _dealt(cluster: Cluster, layers: int, lengths: Sequence[int], items: int) -> float:
    """Units until the last pipeline is done if every micro-batch goes where it is done first.

    Args:
        cluster: whose stages and schedule they are.
        layers: of the model.
        lengths: nodes of each pipeline; a tuple.
        items: micro-batches of all.
    """
    kinds = {nodes: _stages(cluster, layers, nodes) for nodes in lengths}

    def done(nodes: int, micro: int) -> float:
        return pipeline_units(kinds[nodes], micro, cluster.schedule)

    # When each pipeline would be done with one micro-batch more; the earliest first.
    queue = [(done(nodes, 1), index, 1) for index, nodes in enumerate(lengths)]
    heapq.heapify(queue)
    last = 0.0
    for _ in range(items):
        end, index, micro = queue[0]
        last = max(last, end)
        heapq.heapreplace(queue, (done(lengths[index], micro + 1), index, micro + 1))
    return last
