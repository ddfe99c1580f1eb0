"""A run that must survive: ``failover_worker.py supervise WORKERS FOLDER STEPS PAUSE`` starts the workers of it.

Each step every shard's gradient is computed by the worker that has it, all gradients are gathered, and added in the order
of the shards, so that the parameters do not depend, to the bit, on who lived when. Each worker writes a line per step into
its own ``steps-WORKER.jsonl``. PAUSE seconds pass in every step, so that somebody can be killed in it.
"""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

SIZE, SHARDS = 257, 4


def gradient(params, shard, step):
    """A gradient of its own for every shard and step, which depends on the parameters in a way that is not linear."""
    import jax.numpy as jnp

    place = jnp.arange(SIZE, dtype=jnp.float32)
    wanted = jnp.sin(place * (shard + 1) + 0.1 * step)
    return jnp.tanh(params - wanted) * (1 + 0.25 * jnp.cos(place + shard))


def updated(params, moment, total):
    """Momentum."""
    moment = 0.9 * moment + total / SHARDS
    return params - 0.05 * moment, moment


def undisturbed(steps):
    """Parameters and moment after so many steps, on one device, and the checksum after each."""
    import jax
    import numpy as np

    from parallel.failover.transfer import checksum

    gradient_, updated_ = jax.jit(gradient), jax.jit(updated)
    params = moment = np.zeros(SIZE, np.float32)
    sums = []
    for step in range(steps):
        total = np.zeros(SIZE, np.float32)
        for shard in range(SHARDS):
            total = total + np.asarray(gradient_(params, shard, step))
        params, moment = (np.asarray(x) for x in updated_(params, moment, total))
        sums.append(checksum([params, moment]))
    return sums


def jobs_of(members):
    """Shards of each member: its own, and those of the dead before it in the ring."""
    jobs = {member: [] for member in members}
    for shard in range(SHARDS):
        heirs = [member for member in members if member >= shard] or members
        jobs[heirs[0]].append(shard)
    return [jobs[member] for member in members]


def die_on_the_way(member, place, worker, generation):
    """Let a worker kill itself on its way into a generation: before it connects, or before it meets the others."""
    from parallel.failover import world as worlds

    whole = getattr(worlds, place)

    def half(*arguments):
        if member.world.generation == int(generation) and member.worker == int(worker):
            os.kill(os.getpid(), signal.SIGKILL)
        whole(*arguments)

    setattr(worlds, place, half)


def worker(folder: Path, steps: int, pause: float, die: str | None) -> int:
    from parallel.failover.membership import Member

    member = Member()
    if die is not None:
        die_on_the_way(member, *die.split(":"))
    import jax
    import numpy as np

    from parallel.distributed import agreed
    from parallel.failover.transfer import Version, carry, checksum, host_leaves

    log = open(folder / f"steps-{member.worker}.jsonl", "a", buffering=1)  # noqa: SIM115
    kept, done = None, None
    while True:
        world = member.enter(done)
        held = [] if done is None or kept is None else [Version(done, {0: kept}, {"worker": member.worker})]
        carried = carry(held, (0,), {0: [np.zeros(SIZE, np.float32)] * 2})
        if carried is None:
            kept, done = [np.zeros(SIZE, np.float32)] * 2, 0
        else:
            kept, done = carried.parts[0], carried.step
            note = {"carried": done, "source": carried.sources[0], "receivers": carried.receivers[0]}
            log.write(json.dumps({"pid": os.getpid(), "generation": world.generation, **note}) + "\n")
        jobs = jobs_of(world.members)
        try:
            kept, done = run(
                member, world, jobs, kept, done, steps, pause, log, agreed, checksum, host_leaves
            )
        except Stopped as stopped:
            kept, done = stopped.args
            continue
        if member.finish():
            break
    print("CHECKSUM", member.worker, done, checksum(kept), jax.process_count(), flush=True)
    return 0


class Stopped(Exception):
    """The world has to change: the committed state and its step."""


def run(member, world, jobs, kept, done, steps, pause, log, agreed, checksum, host_leaves):
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    slots = SHARDS
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    over, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    rank = world.members.index(member.worker)
    at = np.zeros(SHARDS, np.int32)
    for owner, shards in enumerate(jobs):
        for slot, shard in enumerate(shards):
            at[shard] = owner * slots + slot

    @partial(jax.jit, out_shardings=whole)
    def step_(params, moment, rows):
        total = jax.numpy.zeros(SIZE)
        for shard in range(SHARDS):
            total = total + rows[at[shard]]
        return updated(params, moment, total)

    gradient_ = jax.jit(gradient)

    def put(x):
        return jax.make_array_from_callback(x.shape, whole, lambda index: x[index])

    state, committed = tuple(put(x) for x in kept), checksum(kept)
    try:
        while done < steps:
            member.stepping(done)
            time.sleep(pause)
            rows = np.zeros((slots, SIZE), np.float32)
            for slot, shard in enumerate(jobs[rank]):
                rows[slot] = gradient_(state[0].addressable_data(0), shard, done)
            shape = (slots * len(jobs), SIZE)
            given = jax.make_array_from_callback(shape, over, lambda index, rows=rows: rows)
            new = jax.block_until_ready(step_(*state, given))
            # Only now the step is committed.
            state, done = new, done + 1
            line = {"pid": os.getpid(), "generation": world.generation, "step": done}
            committed = checksum(host_leaves(state))
            line |= {"members": world.members, "crc": committed, "jobs": jobs[rank]}
            log.write(json.dumps(line) + "\n")
            member.stepped(done)
            if agreed(int(member.changing))[0]:
                break
    except (RuntimeError, ValueError) as error:
        member.failed(error)
    # Outside of the handler: what was raised holds the frame, and so the devices, whose connections would stay open.
    kept = host_leaves(state)
    assert checksum(kept) == committed
    if done < steps or member.changing:
        raise Stopped(kept, done)
    return kept, done


def main() -> int:
    mode, workers, folder, steps, pause = sys.argv[1:6]
    if mode == "worker":
        return worker(Path(folder), int(steps), float(pause), sys.argv[6] if sys.argv[6:] else None)
    from parallel.failover.supervisor import SupervisorOptions, supervise

    more = dict(word.split("=") for word in sys.argv[6:])
    options = SupervisorOptions(
        int(workers),
        max_restarts=int(more.get("restarts", 10)),
        heartbeat=float(more.get("heartbeat", 10)),
        collective_timeout=int(more.get("timeout", 30)),
        backoff=float(more.get("backoff", 0.1)),
    )
    command = [sys.executable, __file__, "worker", workers, folder, steps, pause]
    command += [more["die"]] if "die" in more else []
    return supervise(command, options, folder=Path(folder))


if __name__ == "__main__":
    sys.exit(main())
