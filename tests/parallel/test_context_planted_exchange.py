"""Errors of the exchange, each made on purpose: in what plans say of rounds and work, and in the program that follows them.

Workers are ``vmap``'s, so that one device has them all; attention is compared with its formulas in float64. What is wrong in
a plan's arrays runs in one program.
"""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel.context import Exchange, PlanConfig, context_attention, layout, make_plan
from parallel.context import attention as attention_module
from parallel.context import exchange as exchange_module
from parallel.context import plan as plan_module
from parallel.context.arrays import PlanArrays
from parallel.context.exchange import _Rotate
from parallel.context.rounds import Transfers

AXIS = "context"
WORKERS, BLOCK = 4, 4
# Long documents, and short ones and tails that share slots.
LENGTHS = [50, 3, 9, 22, 2, 6]
TOKENS, SHAPE = sum(LENGTHS), (2, 1, 4)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def planned(rounds: str = "rotations"):
    return make_plan(LENGTHS, PlanConfig(WORKERS, BLOCK, stage_rounds=3, rounds=rounds))


@cache
def good():
    plan = planned()
    assert plan.capacity.stages > 2 and plan.balance.transfers > 8
    return plan


def visible() -> np.ndarray:
    """bool[T, T]: queries and the keys that they see."""
    document = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    return (document[:, None] == document) & np.tri(TOKENS, dtype=bool)


@cache
def drawn():
    """q, k, v and cotangents of the output and its log-sum-exp."""
    make = partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
    heads, kv_heads, d = SHAPE
    qkv = tuple(make((TOKENS, n, d)) for n in (heads, kv_heads, kv_heads))
    return qkv, (make((TOKENS, heads, d)), make((TOKENS, heads)))


@cache
def expected() -> tuple[np.ndarray, ...]:
    """Output, log-sum-exp, dq, dk, dv by their formulas."""
    qkv, cotangents = drawn()
    q, k, v, do, dlse = (np.asarray(x, np.float64) for x in (*qkv, *cotangents))
    k, v = k[:, 0], v[:, 0]
    scale = SHAPE[2] ** -0.5
    scores = np.where(visible()[:, None], np.einsum("qhd,kd->qhk", q, k) * scale, -np.inf)
    lse = np.log(np.exp(scores).sum(-1))
    p = np.exp(scores - lse[..., None])
    out = np.einsum("qhk,kd->qhd", p, v)
    ds = p * (np.einsum("qhd,kd->qhk", do, v) - (do * out).sum(-1, keepdims=True) + dlse[..., None]) * scale
    dq, dk = np.einsum("qhk,kd->qhd", ds, k), np.einsum("qhk,qhd->kd", ds, q)
    return out, lse, dq, dk[:, None], np.einsum("qhk,qhd->kd", p, do)[:, None]


def made_program():
    """Attention of all workers, forward and backward, from slots to slots."""
    exchange = Exchange(good().capacity, AXIS)

    def attend(qkv, cotangents, plan, places):
        def run(qkv):
            return context_attention(
                *qkv, plan, places, exchange, return_lse=True, implementation="reference"
            )

        made, back = jax.vjp(run, qkv)
        return *made, *back(cotangents)[0]

    axes = PlanArrays(**(dict.fromkeys(PlanArrays._fields, 0) | {"order": None}))
    return jax.jit(
        jax.vmap(attend, in_axes=(0, 0, axes, 0), axis_name=AXIS, axis_size=WORKERS), compiler_options=QUICK
    )


@cache
def right_program():
    return made_program()


def check_attention(arrays=None, places=None, program=None) -> None:
    """Outputs and gradients against the formulas; what is not given is right."""
    index = layout(good()).index
    there = index >= 0

    def slots(x):
        return np.where(there.reshape(*index.shape, *[1] * (x.ndim - 1)), x[np.maximum(index, 0)], 0)

    qkv, cotangents = jax.tree.map(slots, drawn())
    found = (program or right_program())(qkv, cotangents, arrays or good().arrays, places or layout(good()))
    for name, ours, theirs in zip(("out", "lse", "dq", "dk", "dv"), found, expected()):
        flat = np.zeros(theirs.shape)
        flat[index[there]] = np.asarray(ours)[there]
        np.testing.assert_allclose(flat, theirs, atol=2e-5, rtol=2e-5, err_msg=name)


def test_without_an_error_attention_is_right():
    check_attention()


def used_round() -> tuple[int, int]:
    """(sender, round) in the middle of the second stage's rounds or after them."""
    sender, number = np.nonzero(good().arrays.send_slot >= 0)
    at = int(np.argmax(number >= good().capacity.stage_rounds))
    return int(sender[at]), int(number[at])


def remote_work() -> tuple[int, int]:
    """(worker, entry) of a pair whose keys travel."""
    worker, entry = np.nonzero(good().arrays.work[..., 1] >= good().capacity.slots)
    return int(worker[0]), int(entry[0])


def changed(name: str, change) -> PlanArrays:
    """The plan with one array changed in place by ``change(array)``, or replaced by what that returns."""
    array = getattr(good().arrays, name).copy()
    made = change(array)
    return good().arrays._replace(**{name: array if made is None else made})


def put(at, value):
    def change(array):
        array[at] = value(array[at]) if callable(value) else value

    return change


def another_slot(slot):
    return (slot + 1) % good().capacity.slots


def swapped_rounds(send_slot):
    full = [r for r in range(send_slot.shape[1]) if (send_slot[:, r] >= 0).any()]
    one, other = next(
        (a, b) for a in full for b in full if a < b and (send_slot[:, a] != send_slot[:, b]).any()
        and good().capacity.shift_of_round[a] == good().capacity.shift_of_round[b]
    )  # fmt: skip
    send_slot[:, [one, other]] = send_slot[:, [other, one]]


PLANS = {
    "keys are a block further on": lambda: changed(
        "receive_position", lambda x: np.where(x >= 0, x + BLOCK, x)
    ),
    "keys of another document": lambda: changed("receive_document", lambda x: np.where(x >= 0, x + 1, x)),
    "a round is dropped": lambda: changed("send_slot", put((slice(None), used_round()[1]), -1)),
    "one worker sends nothing in a round": lambda: changed("send_slot", put(used_round(), -1)),
    "another block is sent": lambda: changed("send_slot", put(used_round(), another_slot)),
    "two rounds change places": lambda: changed("send_slot", swapped_rounds),
    "a pair is left out": lambda: changed(
        "work_start", put(remote_work()[0], lambda starts: np.minimum(starts, starts[-1] - 1))
    ),
    "a pair is computed twice": lambda: changed(
        "work", lambda work: np.concatenate([work[:, :1], work[:, :-1]], axis=1)
    ),
    "own keys are left out": lambda: changed("work_start", put((slice(None), 0), 1)),
    "keys of the next round": lambda: changed("work", put((*remote_work(), 1), lambda keys: keys - 1)),
    "queries of another slot": lambda: changed("work", put((*remote_work(), 0), another_slot)),
    "a pair does not wait for its keys": lambda: changed(
        "work_start", put((remote_work()[0], 1), lambda first: first + 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("error", PLANS)
def test_an_error_in_a_plan_is_noticed(error):
    with pytest.raises(AssertionError):
        check_attention(PLANS[error]())


@pytest.mark.parametrize("name", ["positions", "segment_ids"])
def test_an_error_in_the_layout_is_noticed(name):
    right = layout(good())
    wrong = getattr(right, name).copy()
    worker, slot = np.argwhere(right.positions[..., 0] >= BLOCK)[0]
    wrong[worker, slot] += -BLOCK if name == "positions" else 1
    with pytest.raises(AssertionError):
        check_attention(places=right._replace(**{name: wrong}))


def unscaled(before, new):
    return before[0] + new[0], jnp.logaddexp(before[1], new[1])


def given_back_to(slot_of):
    """``_Rotate.give_back`` to other slots."""
    made = _Rotate.give_back
    return lambda self, home, x: made(
        replace(self, rounds=self.rounds._replace(send_slot=slot_of(self.rounds.send_slot))), home, x
    )


def early(made=Exchange.give_back):
    """Gradients of a stage to where those of the next belong."""
    return lambda self, home, tree, plan, stage: made(
        self, home, tree, plan, (stage + 1) % self.capacity.stages
    )


def latest(capacity, plan, stage, kv, made=attention_module._arrived):
    return made(capacity, plan, stage % capacity.stages + 1, kv)


def without_dlse(*args, dlse, made=attention_module.attention_backward, **more):
    return made(*args, dlse=0 * dlse, **more)


PROGRAMS = {
    "only the last part counts": (attention_module, "merge", lambda before, new: new),
    "parts are added unscaled": (attention_module, "merge", unscaled),
    "what came is taken for another stage's": (attention_module, "_arrived", latest),
    "the log-sum-exp has no gradient": (attention_module, "attention_backward", without_dlse),
    "gradients never come home": (Exchange, "give_back", lambda self, home, tree, plan, stage: home),
    "gradients of another stage come home": (Exchange, "give_back", early()),
}
MOVES = {
    "keys go the other way": (
        _Rotate, "_permute", lambda self, x, shift, made=_Rotate._permute: made(self, x, -shift),
    ),
    "gradients go on instead of home": (
        _Rotate, "_permute", lambda self, x, shift, made=_Rotate._permute: made(self, x, abs(shift)),
    ),
    "gradients replace what is at home": (
        exchange_module, "_add", lambda home, slot, x: home.at[slot].set(x, mode="drop"),
    ),
    "gradients of unused rounds are added too": (
        exchange_module, "_add", lambda home, slot, x: home.at[jnp.maximum(slot, 0)].add(x),
    ),
    "gradients go to another slot": (
        _Rotate, "give_back", given_back_to(lambda slot: jnp.where(slot >= 0, slot ^ 1, slot)),
    ),
    "unused rounds bring the first slot": (
        exchange_module, "_take", lambda x, slot: jnp.take(x, jnp.maximum(slot, 0), axis=0),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("error", PROGRAMS)
def test_an_error_in_attention_is_noticed(error, monkeypatch):
    where, name, wrong = PROGRAMS[error]
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError):
        check_attention(program=made_program())


def check_moves() -> None:
    """Every block comes whence the plan says and nothing else does; gradients go back, and what is at home stays."""
    plan, capacity = good().arrays, good().capacity
    exchange = Exchange(capacity, AXIS)
    rng = np.random.default_rng(0)
    x = rng.integers(1, 9, (WORKERS, capacity.slots, 2)).astype(np.float32)
    y = rng.integers(1, 9, (WORKERS, capacity.rounds, 2)).astype(np.float32)

    def run(x, y, send_slot):
        arrays = PlanArrays(*[None] * len(PlanArrays._fields))._replace(send_slot=send_slot)
        group, home, came = capacity.stage_rounds, jnp.ones_like(x), []
        for stage in range(capacity.stages):
            moves = _Rotate(
                exchange, arrays._replace(send_slot=send_slot[stage * group : (stage + 1) * group]), stage
            )
            came.append(moves.fetch(x))
            home = moves.give_back(home, y[stage * group : (stage + 1) * group])
        return jnp.concatenate(came), home

    everyone = jax.vmap(run, axis_name=AXIS, axis_size=WORKERS)
    came, home = jax.jit(everyone, compiler_options=QUICK)(x, y, plan.send_slot)
    there = plan.receive_from >= 0
    np.testing.assert_array_equal(
        came, np.where(there[..., None], x[plan.receive_from, plan.receive_slot], 0)
    )
    wanted = np.ones_like(x)
    np.add.at(wanted, (plan.receive_from[there], plan.receive_slot[there]), y[there])
    np.testing.assert_array_equal(home, wanted)


def test_without_an_error_moves_are_right():
    check_moves()


@pytest.mark.parametrize("error", MOVES)
def test_an_error_in_the_moves_is_noticed(error, monkeypatch):
    where, name, wrong = MOVES[error]
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError):
        check_moves()


def check_rounds(rounds: str) -> None:
    """Who needs a block of keys gets it once, from who has it, and no one sends or receives twice in a round."""
    plan = planned(rounds)
    arrays, blocks, worker = plan.arrays, plan.blocks, plan.placement.worker
    block_of = np.repeat(np.arange(len(blocks)), blocks.length)
    query, key = np.nonzero(visible())
    needed = {
        (int(worker[q]), int(k)) for q, k in zip(block_of[query], block_of[key]) if worker[q] != worker[k]
    }
    found = []
    for receiver, number in np.argwhere(arrays.receive_from >= 0):
        sender = arrays.receive_from[receiver, number]
        assert arrays.send_to[sender, number] == receiver
        assert arrays.send_slot[sender, number] == arrays.receive_slot[receiver, number]
        if rounds == "rotations":
            assert plan.capacity.shift_of_round[number] == (receiver - sender) % WORKERS
        sent = (arrays.slot[sender] == arrays.receive_slot[receiver, number]) & (arrays.length[sender] > 0)
        (column,) = np.flatnonzero(sent)
        start = arrays.start[sender, column]
        found.append((int(receiver), int(np.searchsorted(blocks.start, start))))
    assert sorted(found) == sorted(needed) and (arrays.send_to >= 0).sum() == len(found)


def last_dropped(*args, made=plan_module.transfers):
    moves, move = made(*args)
    few = Transfers(moves.block[:-1], moves.sender[:-1], moves.receiver[:-1])
    return few, np.where(move == len(few), -1, move)


ROUNDS = {
    "a block is forgotten": ("rotations", plan_module, "transfers", last_dropped),
    "a shift begins a round early": (
        "rotations", Transfers, "rotations",
        lambda self, *args, made=Transfers.rotations: np.maximum(made(self, *args) - 1, 0),
    ),
    "shifts are counted from the receiver": (
        "rotations", Transfers, "_shifted",
        lambda self, workers: (self.sender - self.receiver) % workers * workers + self.sender,
    ),
    "two rounds become one": (
        "matchings", Transfers, "unlocked_first", lambda self, rounds, unlocked: np.maximum(rounds - 1, 0),
    ),
    "all in one round": (
        "matchings", plan_module, "schedule", lambda moves, *more: np.zeros(len(moves), np.int64),
    ),
}  # fmt: skip


def test_without_an_error_rounds_are_right():
    for rounds in ("rotations", "matchings"):
        check_rounds(rounds)


@pytest.mark.parametrize("error", ROUNDS)
def test_an_error_in_the_rounds_is_noticed(error, monkeypatch):
    rounds, where, name, wrong = ROUNDS[error]
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError):
        check_rounds(rounds)
