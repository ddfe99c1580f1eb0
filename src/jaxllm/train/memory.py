"""What training takes on each device, by part; and what to say when it is too much."""

from dataclasses import dataclass, replace
from math import prod

from jaxllm.axes import described
from jaxllm.config import GatedDeltaConfig, ModelConfig
from jaxllm.model.functional import param_axes
from jaxllm.train.context import ContextSettings, sight
from jaxllm.train.placement import check_mesh
from jaxllm.train.step import StepSettings
from parallel.mesh import ROWS, MeshShape, abstract_mesh
from parallel.sharding import Placement

FLOAT = 4


class OutOfMemory(RuntimeError):
    """The device is too small for this training; the message names the largest buffers and what to lower."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device at the peak of a step; an estimate for all but the state, which is exact.

    Attributes:
        parameters: float32 masters.
        moments: both of Adam's, float32.
        gradients: float32; twice with accumulation (the sum and the microbatch's own).
        activations: kept for backward, plus the largest layer that is recomputed.
        gathered: of the largest sub-block, whose shares come together while it is computed.
        exchanged: what attention has of other devices' keys and values at once, with gradients, or a layer with a state of
            theirs.
        logits: of one chunk, with their gradient, and the gradient of the head.
        batch: the packed integers and weights.
    """

    parameters: int
    moments: int
    gradients: int
    activations: int
    gathered: int
    exchanged: int
    logits: int
    batch: int

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name, largest first."""
        return dict(sorted(vars(self).items(), key=lambda item: -item[1]))

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())


@dataclass
class _Tokenwise:
    """Values per token that one sub-block leaves for backward: all of them, and the matrix products only."""

    everything: int = 0
    products: int = 0


def _sub_block(cfg: ModelConfig, letter: str, seq_len: int) -> _Tokenwise:
    width = cfg.hidden_size
    if letter == "M":
        assert cfg.mamba is not None
        m = cfg.mamba
        chunk = min(m.chunk_size, 64, seq_len)
        projected = m.inner_size + m.conv_size + m.num_heads
        # Decay and masked score matrices of a chunk: three of [Q, Q] per head; states before each chunk.
        scan = 3 * chunk * m.num_heads + m.inner_size * m.state_size // chunk
        everything = 2 * width + projected + 2 * m.conv_size + 3 * m.inner_size + scan
        return _Tokenwise(everything, projected + m.inner_size + chunk * m.n_groups + width)
    d = {"G": cfg.delta, "J": cfg.jet}.get(letter)
    if d is not None:
        chunk, heads = min(d.chunk_size, seq_len), d.value_size // d.value_head_dim
        projected = 2 * d.key_size + 2 * d.value_size + 2 * heads
        taps = 0 if isinstance(d, GatedDeltaConfig) else d.conv_kernel * d.value_size + 2 * d.generator_size
        # Decays, chunk matrix, its inverse twice and scores: five of [Q, Q] per head; states before each chunk.
        rule = 5 * chunk * heads + heads * d.key_head_dim * d.value_head_dim // chunk
        # The factors of a chunk beside q, k and v: W, the decayed q and k, U, the corrected values, what enters.
        factors = 3 * heads * d.key_head_dim + 3 * d.value_size
        everything = 2 * width + 2 * projected + taps + rule + factors + 3 * d.value_size
        return _Tokenwise(everything, projected + taps + factors + 2 * chunk * heads + width)
    if letter == "-":
        assert cfg.mlp is not None
        wide = cfg.mlp.intermediate_size * (2 if cfg.mlp.activation == "swiglu" else 1)
        return _Tokenwise(2 * width + wide + 2 * cfg.mlp.intermediate_size, wide + width)
    if letter == "E":
        assert cfg.moe is not None
        m = cfg.moe
        up = 2 if m.activation == "swiglu" else 1
        latent = m.latent_size or width
        # Sorted inputs and outputs, the experts' inner values before and after the activation, for each copy.
        copies = m.top_k * (3 * latent + (up + 1) * m.intermediate_size)
        shared = m.shared_intermediate_size or 0
        dense = 2 * width + 4 * m.num_experts + 2 * (latent if m.latent_size else 0)
        # The products of the routed experts are not plain ones: they are recomputed.
        return _Tokenwise(dense + copies + (up + 2) * shared, up * shared + m.num_experts + 2 * width)
    assert cfg.attention is not None
    a = cfg.attention
    heads = a.head_dim * (a.num_heads + 2 * a.num_kv_heads)
    return _Tokenwise(
        2 * width + 2 * heads + 2 * a.head_dim * a.num_heads, heads + a.head_dim * a.num_heads + width
    )


def _stored(cfg: ModelConfig, mesh: MeshShape) -> tuple[int, int]:
    """Parameters that a device holds, and those of the largest sub-block that it gathers."""
    place = Placement(abstract_mesh(mesh))
    held, blocks = 0, dict[str, int]()
    for name, axes in param_axes(cfg.replace(scan_layers=False)).items():
        count = prod(axis.size for axis in axes)
        at_rest = [described(axis) for axis in axes]
        cut = place.shares(at_rest)
        held += count // cut // (mesh.stage if name.startswith("layers.") else 1)
        block = ".".join(name.split(".")[:2])
        own = count // place.shares_at_hand(at_rest)
        blocks[block] = blocks.get(block, 0) + (own if own > count // cut else 0)
    return held, max(blocks.values())


def _fitting(context: ContextSettings | None, tokens: int) -> ContextSettings:
    """The settings; without them blocks that are no larger than a device's tokens."""
    if context is not None:
        return context
    standard = ContextSettings()
    return replace(standard, block=max(1, min(standard.block, tokens)))


def _exchanged(cfg: ModelConfig, mesh: MeshShape, context: ContextSettings, slots: int) -> int:
    """Bytes of what attention, or a layer with a state, has of other devices at a time."""
    width = 2 if cfg.precision.compute == "bfloat16" else FLOAT
    found = [0]
    if cfg.attention is not None and set("*W") & set(cfg.letters):
        a = cfg.attention
        if context.strategy == "ulysses":
            found.append(slots * context.block * a.head_dim * (a.num_heads + 2 * a.num_kv_heads) * width)
        else:
            blocks, seen = min(2 * context.stage_rounds, (mesh.context - 1) * slots), sight(cfg)
            if seen is not None:
                # Before each of its own blocks a device needs those that a window reaches, and no others.
                blocks = min(blocks, slots * -(-(seen - 1) // context.block))
            found.append(blocks * context.block * 2 * a.head_dim * a.num_kv_heads * (width + FLOAT))
    # The map of each block and the state before it, and the same of the other devices' for a share of the elements.
    if cfg.mamba is not None and "M" in cfg.letters:
        found.append(4 * slots * cfg.mamba.inner_size * cfg.mamba.state_size * FLOAT)
    for letter, d in (("G", cfg.delta), ("J", cfg.jet)):
        if d is not None and letter in cfg.letters:
            heads = d.value_size // d.value_head_dim
            found.append(4 * slots * heads * d.key_head_dim * (d.key_head_dim + d.value_head_dim) * FLOAT)
    return max(found) // mesh.tensor


def estimate_training_memory(
    cfg: ModelConfig,
    batch: int,
    seq: int,
    mesh: MeshShape | int = 1,
    settings: StepSettings | None = None,
    context: ContextSettings | None = None,
) -> TrainingMemory:
    """Memory of one device: its rows, its share of the state, and the largest sub-block that it gathers.

    Args:
        cfg: model.
        batch: rows of a whole step.
        seq: tokens of a row.
        mesh: devices along each axis, or devices along ``data``.
        settings: accumulation, rematerialisation and loss chunk.
        context: how devices along ``context`` share documents; None: in blocks of their default size, or as large as fit.

    Raises:
        ConfigError: the model does not fit the mesh.
        ValueError: the rows of a step do not cut into equal parts for the devices and ``accum_steps``.
    """
    settings = settings or StepSettings()
    mesh = MeshShape(data=mesh) if isinstance(mesh, int) else mesh
    check_mesh(cfg, mesh)
    devices = prod(getattr(mesh, axis) for axis in ROWS)
    shares = devices * settings.accum_steps
    if batch < 1 or seq < 1 or batch % shares:
        raise ValueError(
            f"batch={batch}, seq={seq}, devices={devices}: all must be at least 1, and devices * accum_steps = {shares} "
            "must divide batch"
        )
    count, gathered = _stored(cfg, mesh)
    tokens, words = batch * seq // shares, 5
    exchanged = 0
    if mesh.context > 1:
        context = _fitting(context, tokens // mesh.context)
        # Slots that documents' ends leave partly empty take as much as full ones: about one more.
        slots = -(-tokens // (mesh.context * context.block)) + 1
        tokens, words = slots * context.block, 8
        exchanged = _exchanged(cfg, mesh, context, slots)
    width = 2 if cfg.precision.compute == "bfloat16" else FLOAT
    blocks = [_sub_block(cfg, letter, seq) for letter in cfg.pattern]
    if settings.remat == "none":
        kept, again = sum(block.everything for block in blocks), 0
    else:
        kept, again = cfg.hidden_size * len(blocks), max(block.everything for block in blocks)
        kept += sum(block.products for block in blocks) if settings.remat == "dots" else 0
    # A stage keeps its layers' values of every tick: all microbatches are on their way before the first comes back.
    ticks = settings.accum_steps + mesh.stage - 1 if mesh.stage > 1 else 1
    kept = (ticks * kept // mesh.stage + again) // mesh.tensor
    added_up = settings.accum_steps > 1 and mesh.stage == 1
    head = cfg.vocab_size // mesh.tensor * cfg.hidden_size * FLOAT
    return TrainingMemory(
        parameters=count * FLOAT,
        moments=2 * count * FLOAT,
        gradients=count * FLOAT * (2 if added_up else 1),
        activations=int(tokens * (kept + 3 * ticks * cfg.hidden_size) * width),
        gathered=gathered * FLOAT,
        exchanged=exchanged,
        logits=2 * min(settings.loss_chunk, tokens) * (cfg.vocab_size // mesh.tensor) * FLOAT + head,
        batch=settings.accum_steps * tokens * words * FLOAT,
    )


REMEDIES = {
    "activations": "a smaller batch, remat='layer', accum_steps > 1 or a shorter sequence",
    "logits": "a smaller loss_chunk or vocabulary",
    "parameters": "mesh.fsdp > 1 or a smaller model",
    "moments": "mesh.fsdp > 1 or a smaller model",
    "gradients": "a smaller model",
    "gathered": "mesh.tensor or mesh.expert > 1",
    "exchanged": "a smaller context.block or context.stage_rounds",
    "batch": "a smaller batch",
}


def out_of_memory(memory: TrainingMemory, error: BaseException) -> OutOfMemory:
    """The error to raise for a RESOURCE_EXHAUSTED: the three largest parts and what lowers each."""
    largest = list(memory.parts.items())[:3]
    listed = "; ".join(
        f"{name} about {size / 2**20:,.0f} MiB (lower with {REMEDIES[name]})" for name, size in largest
    )
    detail = str(error).strip().splitlines()[0][:200]
    return OutOfMemory(
        f"the device ran out of memory. Of about {memory.total / 2**20:,.0f} MiB that a step takes, the largest are: "
        f"{listed}. The device said: {detail}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is the runtime's way of saying so."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()
