"""The hybrid decoder: a pattern string, one residual sub-block per letter."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.axes import Axis
from jaxllm.batch import PackedBatch
from jaxllm.cache.state import Cache
from jaxllm.cache.window import CacheWindow
from jaxllm.config import ModelConfig, require
from jaxllm.linear import Context, linear
from jaxllm.model.attention import Attention
from jaxllm.model.gated_delta import GatedDelta
from jaxllm.model.jet import Jet
from jaxllm.model.layers import Embedding, Linear, RMSNorm
from jaxllm.model.mamba import Mamba
from jaxllm.model.mlp import MLP
from jaxllm.model.moe import MoE
from jaxllm.model.mtp import MTP
from jaxllm.model.scan import Group, Span, groups_of
from jaxllm.model.shares import at_hand
from pallas_kernels.precision import contract
from parallel.failover.degraded import skip
from parallel.sharding import everything_but_gathered

Aux = dict[str, Any]


def build_mixer(
    cfg: ModelConfig, letter: str, rngs: nnx.Rngs
) -> Mamba | GatedDelta | Jet | Attention | MLP | MoE:
    """The module behind one pattern letter."""
    if letter == "M":
        return Mamba(cfg, rngs=rngs)
    if letter == "G":
        return GatedDelta(cfg, rngs=rngs)
    if letter == "J":
        return Jet(cfg, rngs=rngs)
    if letter == "-":
        return MLP(cfg, rngs=rngs)
    if letter == "E":
        return MoE(cfg, rngs=rngs)
    assert cfg.attention is not None
    return Attention(cfg, window=cfg.attention.window if letter == "W" else None, rngs=rngs)


class Block(nnx.Module):
    """``h + mixer(norm(h))``."""

    def __init__(self, cfg: ModelConfig, letter: str, *, rngs: nnx.Rngs):
        embed = Axis("embed", cfg.hidden_size)
        self.letter = letter
        self.norm = RMSNorm(embed, eps=cfg.norm_eps, cast=cfg.norm_cast, dtype=cfg.precision.param, rngs=rngs)
        self.mixer = build_mixer(cfg, letter, rngs)

    def __call__(self, h: Array, batch: PackedBatch, ctx: Context) -> tuple[Array, Aux]:
        y, aux = self.mixer(self.norm(h), batch, ctx)
        return (skip(h, y) if self.letter in ctx.skipped else h + y), aux

    def extend(self, h: Array, batch: PackedBatch, state: Any, ctx: Context) -> tuple[Array, Any, Aux]:
        y, state, aux = self.mixer.extend(self.norm(h), batch, state, ctx)
        return h + y, state, aux

    def window(self, h: Array, batch: PackedBatch, state: Any, ctx: Context) -> tuple[Array, Any, Aux]:
        y, window, aux = self.mixer.window(self.norm(h), batch, state, ctx)
        return h + y, window, aux


class HybridLM(nnx.Module):
    """A decoder language model built from ``cfg.pattern``.

    ``model(batch)`` gives logits; ``model.hidden`` and ``model.extend`` stop before the head, so that a loss can take
    it in chunks and a decode step only at the last tokens.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype = cfg.precision.param
        vocab, embed = Axis("vocab", cfg.vocab_size), Axis("embed", cfg.hidden_size)
        self.embed = Embedding(vocab, embed, std=cfg.init_std, dtype=dtype, rngs=rngs)
        if cfg.scan_layers:
            self.groups = nnx.List([_group(cfg, span, rngs) for span in groups_of(cfg.pattern)])
        else:
            self.layers = nnx.List([Block(cfg, letter, rngs=rngs) for letter in cfg.pattern])
        self.norm_f = RMSNorm(embed, eps=cfg.norm_eps, cast=cfg.norm_cast, dtype=dtype, rngs=rngs)
        self.lm_head = (
            None
            if cfg.tie_embeddings
            else Linear(embed, vocab, bias=False, std=cfg.init_std, dtype=dtype, rngs=rngs)
        )

        self.mtp = None if cfg.mtp is None else nnx.List([_mtp(cfg, rngs) for _ in range(cfg.mtp.blocks)])

    def context(self, **changes: Any) -> Context:
        """A context in the model's own precision."""
        return Context(precision=self.cfg.precision, **changes)

    def hidden(self, batch: PackedBatch, ctx: Context | None = None) -> tuple[Float[Array, "B T D"], Aux]:
        """Final hidden states (after the last norm) of packed documents, and what ``ctx.taps`` asked for.

        ``hidden`` is every residual state [1 + layers, B, T, D], the embedding first; another tap is what the layers
        that know it report, stacked in their order.

        Raises:
            ValueError: no layer of the model knows a tap.
        """
        ctx = ctx or self.context()
        h, aux = self.through(at_hand(self.embed, ctx)(batch.tokens, ctx), batch, ctx)
        return at_hand(self.norm_f, ctx)(h), aux

    def through(
        self, h: Float[Array, "B T D"], batch: PackedBatch, ctx: Context
    ) -> tuple[Float[Array, "B T D"], Aux]:
        """The residual state after the layers, from that before them, and what ``ctx.taps`` asked for.

        With devices along ``stage`` the layers are this device's.
        """
        states: list[Any] = [h]
        reports: list[Aux] = []
        if self.cfg.scan_layers:
            for group in self.groups:
                h, seen = group(h, batch, ctx, _checkpointed)
                states += [after for after, _ in seen]
                reports += [report for _, report in seen]
        else:
            for block in self.layers:
                h, report = _checkpointed(block, ctx)(h, batch)
                states.append(h)
                reports.append(report)
        return h, _collect(ctx, states, reports)

    def _read_on(
        self,
        read: Callable[..., tuple[Array, Any, Aux]],
        batch: PackedBatch,
        cache: Cache,
        ctx: Context | None,
    ) -> tuple[Array, tuple[Any, ...], Aux]:
        """Final hidden states after ``read``, a method of :class:`Block`, with every layer's state; what each leaves; taps."""
        require(
            not self.cfg.scan_layers, "scan_layers", True, "is for training; use functional.unstack first"
        )
        ctx = ctx or self.context()
        h = self.embed(batch.tokens, ctx)
        hidden: list[Any] = [h]
        left, reports = [], []
        for block, state in zip(self.layers, cache.opened(), strict=True):
            h, kept, report = read(block, h, batch, state, ctx)
            left.append(kept)
            hidden.append(h)
            reports.append(report)
        return self.norm_f(h), tuple(left), _collect(ctx, hidden, reports)

    def extend(
        self, batch: PackedBatch, cache: Cache, ctx: Context | None = None
    ) -> tuple[Float[Array, "B T D"], Cache, Aux]:
        """Final hidden states of a chunk that goes on from ``cache``, the cache after it, and taps as in ``hidden``."""
        h, states, aux = self._read_on(Block.extend, batch, cache, ctx)
        return h, cache.closed(states), aux

    def predict(
        self, h: Float[Array, "B T D"], batch: PackedBatch, ctx: Context | None = None, *, depth: int = 1
    ) -> tuple[Float[Array, "B T D"], Aux]:
        """Hidden states of the next prediction depth, and taps of its block as in :meth:`hidden`.

        ``head`` gives the logits of the token after ``batch.tokens``.

        In training ``batch`` holds the tokens ``depth`` steps ahead. A draft is the same call on one token per row,
        the one that was sampled last, with the hidden state that it was sampled from: it sees no other position.

        Args:
            h: hidden states of the depth before (of :meth:`hidden` or :meth:`extend` for depth 1).
            batch: the tokens that this depth reads, at the positions of ``h``.
            ctx: as everywhere.
            depth: from 1.

        Raises:
            ConfigError: the model has no prediction blocks, or none for this depth.
        """
        blocks = 0 if self.mtp is None else len(self.mtp)
        require(blocks > 0, "mtp", None, "the model has no multi-token prediction")
        deepest = "1 or more" if blocks == 1 else f"1 to {blocks}"
        require(depth >= 1 and (blocks == 1 or depth <= blocks), "depth", depth, f"must be {deepest}")
        assert self.mtp is not None
        ctx = ctx or self.context()
        block = self.mtp[0 if blocks == 1 else depth - 1]
        e = at_hand(self.embed, ctx)(batch.tokens, ctx)
        h, states, reports = at_hand(block, ctx)(h, e, batch, ctx)
        return h, _collect(ctx, states, reports)

    def window(
        self, batch: PackedBatch, cache: Cache, ctx: Context | None = None
    ) -> tuple[Float[Array, "B W D"], CacheWindow, Aux]:
        """Final hidden states of a window that goes on from ``cache`` and leaves it as it is.

        Args:
            batch: one segment a row; ``parents`` makes it a tree, ``positions`` are the committed tokens' number and
                a node's depth (``PackedBatch.from_rows`` with ``offset`` and ``parents``).
            cache: pools; each row goes on from its slot.
            ctx: ``kv_bound`` has to reach every row's committed tokens, not the window's.

        Returns:
            the hidden states that ``extend`` over the path to each node would give, what :meth:`commit` takes, and
            taps as in :meth:`hidden`.

        Raises:
            ConfigError: the layers are stacked.
            ValueError: ``parents`` or ``slots`` has not the shape of a window's.
        """
        h, windows, aux = self._read_on(Block.window, batch, cache, ctx)
        return h, CacheWindow(layers=windows, groups=cache.groups), aux

    def commit(self, window: CacheWindow, path: Int[Array, "B m"], n: Int[Array, " B"]) -> Cache:
        """The cache as if only one path of the window had been run by ``extend``.

        Args:
            window: of :meth:`window`.
            path: for each row nodes from the top down, each the child of the one before it; only the first ``n``
                count. Padding on it is passed over.
            n: how many nodes of its path each row accepts; 0 leaves its slot as it is, bit by bit. Keys at
                positions past the slot's capacity are dropped, as ``extend`` does: who grows a window keeps count.
        """
        layers = zip(self.layers, window.layers, strict=True)
        states = tuple(block.mixer.commit(state, path, n) for block, state in layers)
        return Cache(layers=(), groups=window.groups).closed(states)

    def head(self, h: Float[Array, "B T D"], ctx: Context | None = None) -> Float[Array, "B T V"]:
        """Logits in float32."""
        ctx = ctx or self.context()
        if self.lm_head is None:
            # Not linear(h, table.T): XLA:CPU cannot run the transposed bfloat16 product of its gradient.
            table = self.embed.weight[...]
            operand = ctx.precision.operand
            table = table if operand else table.astype(h.dtype)
            return contract("btd,vd->btv", h, table, operand_dtype=operand, out_dtype=jnp.float32)
        return linear(h, self.lm_head.weight.get_value(), ctx, jnp.float32)

    def __call__(self, batch: PackedBatch, ctx: Context | None = None) -> Float[Array, "B T V"]:
        h, _ = self.hidden(batch, ctx)
        return self.head(h, ctx)


def _group(cfg: ModelConfig, span: Span, rngs: nnx.Rngs) -> Group:
    return Group(span, lambda rngs, place: Block(cfg, cfg.pattern[span.start + place], rngs=rngs), rngs=rngs)


def _mtp(cfg: ModelConfig, rngs: nnx.Rngs) -> MTP:
    assert cfg.mtp is not None
    return MTP(cfg, [Block(cfg, letter, rngs=rngs) for letter in cfg.mtp.pattern], rngs=rngs)


def _collect(ctx: Context, hidden: list[Any], reports: list[Aux]) -> Aux:
    """What ``ctx.taps`` asked for, stacked over the layers that report it (contract 7)."""
    aux = {"hidden": jnp.stack(hidden)} if "hidden" in ctx.taps else {}
    for name in sorted({name for report in reports for name in report}):
        aux[name] = jnp.stack([report[name] for report in reports if name in report])
    unknown = sorted(ctx.taps - set(aux))
    if unknown:
        raise ValueError(f"taps={unknown}: no layer of this model reports them")
    return aux


def _checkpointed(block: Block, ctx: Context) -> Any:
    """``block`` under the rematerialisation that ``ctx.remat`` names."""

    def call(h: Array, batch: PackedBatch) -> tuple[Array, Aux]:
        return at_hand(block, ctx)(h, batch, ctx)

    if block.letter in ctx.skipped:
        # Nothing of it is needed in backward.
        return call
    if ctx.remat == "none":
        return call if ctx.placement is None else jax.checkpoint(call, policy=everything_but_gathered)
    if ctx.remat == "layer":
        return jax.checkpoint(call)
    if ctx.remat == "dots":
        return jax.checkpoint(call, policy=jax.checkpoint_policies.dots_saveable)
    raise ValueError(f"remat={ctx.remat!r}: none, layer or dots")
