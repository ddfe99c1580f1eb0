"""Jet-Nemotron: the released configurations, every tensor's name and shape, and what transformers makes of its parts."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_cases import JET, VOCAB, prompt, weight, write_folder
from hf_mutants import _params, surviving
from hf_parity import Expected, check_cached, check_prefill
from safetensors.numpy import load_file, save_file

import jaxllm.hf as hf
from jaxllm.config import ConfigError
from jaxllm.model.functional import abstract_params, flatten
from jaxllm.presets import preset

# As jet-ai/Jet-Nemotron-2B has it on the hub.
RELEASED_2B = {
    "architectures": ["JetNemotronForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_jet_nemotron.JetNemotronConfig"},
    "bos_token_id": 151643,
    "efficient_attention_config": {
        "jet": {
            "conv_size": 4,
            "dconv_generator_reduction": 8,
            "dconv_implementation": "triton",
            "expand_v": 2.6666666667,
            "head_dim": 96,
            "mode": "chunk",
            "norm_eps": "1e-5",
            "num_heads": 12,
        },
        "swa": {"window_size": 1152},
    },
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "layer_types": [*["jet"] * 14, "attn", *["jet"] * 4, "attn", "swa", "swa", *["jet"] * 6],
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "jet_nemotron",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.3",
    "use_cache": True,
    "use_mrope": False,
    "vocab_size": 151936,
}


def test_the_released_configuration_is_the_preset() -> None:
    assert hf.config_from_hf(RELEASED_2B) == preset("jet-nemotron-2b")


def test_what_is_written_says_the_same_as_what_was_released() -> None:
    written = hf.config_to_hf(preset("jet-nemotron-2b"), "jet_nemotron")
    unread = {"auto_map", "bos_token_id", "eos_token_id", "torch_dtype", "transformers_version"}
    for name in RELEASED_2B.keys() - unread - {"efficient_attention_config", "max_position_embeddings"}:
        assert written[name] == RELEASED_2B[name], name
    theirs, ours = RELEASED_2B["efficient_attention_config"], written["efficient_attention_config"]
    assert ours["swa"] == theirs["swa"]
    assert ours["jet"] == theirs["jet"] | {"norm_eps": "1e-05"}
    # The released code cuts off where it should round.
    assert int(12 * 96 * ours["jet"]["expand_v"]) == 3072


@pytest.mark.parametrize(("name", "count"), [("jet-nemotron-2b", 1.965e9), ("jet-nemotron-4b", 3.960e9)])
def test_published_sizes(name: str, count: float) -> None:
    leaves = jax.tree.leaves(abstract_params(preset(name)))
    assert sum(leaf.size for leaf in leaves) == pytest.approx(count, abs=0.0005e9)


def test_every_tensor_of_the_2b_by_name_and_shape() -> None:
    cfg = preset("jet-nemotron-2b")
    wanted: dict[str, list[int]] = {
        "model.embed_tokens.weight": [151936, 1536],
        "model.norm.weight": [1536],
    }
    square = [1536, 1536]
    attention = {f"{n}_proj.weight": s for n, s in zip("qkvo", (square, [256, 1536], [256, 1536], square))}
    attention |= {f"{n}_proj.bias": [s] for n, s in zip("qkv", (1536, 256, 256))}
    jet = {f"{n}_proj.weight": [s, 1536] for n, s in zip("qkvbag", (1152, 1152, 3072, 12, 12, 3072))}
    generator = "dynamic_conv1d.kernel_generator"
    jet |= {"o_proj.weight": [1536, 3072], "A_log": [12], "dt_bias": [12], "o_norm.weight": [256]}
    jet |= {f"{generator}.w1.weight": [384, 1536], f"{generator}.w2.bias": [12288]}
    jet |= {f"{generator}.w2.weight": [12288, 384]}
    for layer, kind in enumerate(RELEASED_2B["layer_types"]):
        start = f"model.layers.{layer}."
        mixer = jet if kind == "jet" else attention
        wanted |= {f"{start}self_attn.{name}": shape for name, shape in mixer.items()}
        wanted |= {f"{start}{n}_layernorm.weight": [1536] for n in ("input", "post_attention")} | {
            f"{start}mlp.{n}_proj.weight": s for n, s in zip(("gate", "up"), [[8960, 1536]] * 2)
        }
        wanted[f"{start}mlp.down_proj.weight"] = [1536, 8960]
    ours = {place.name: list(place.shape) for place in hf.tensor_names(cfg, "jet_nemotron")}
    assert ours == wanted


@pytest.mark.parametrize("change", [{"norm_eps": 3e-3}, {"expand_v": 8 / 3}, {"expand_v": 2.66667}])
def test_spellings_of_the_same_block(change: dict[str, Any]) -> None:
    sections = JET["efficient_attention_config"]
    data = JET | {"efficient_attention_config": sections | {"jet": sections["jet"] | change}}
    cfg = hf.config_from_hf(JET)
    assert (cfg.pattern, cfg.jet.value_head_dim, cfg.jet.norm_eps) == ("J-W-*-J-", 16, 3e-3)
    assert hf.config_from_hf(data) == cfg
    assert hf.config_from_hf(json.loads(json.dumps(hf.config_to_hf(cfg, "jet_nemotron")))) == cfg


def _sections(**changes: Any) -> dict[str, Any]:
    return {"efficient_attention_config": JET["efficient_attention_config"] | changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["jet", "mamba"] * 2}, "layer_types=.*mamba"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3 entries"),
        (_sections(jet={"expand_v": 1.5, "head_dim": 5}), "expand_v=1.5: times head_dim=5"),
        (_sections(jet={"norm_eps": "small"}), "'small': is not a number"),
        (_sections(jet={"heads": 3}), "efficient_attention_config.jet=.*heads"),
        (_sections(swa={}), "needs window_size"),
        (_sections(gla={}), "efficient_attention_config=.*gla"),
        ({"efficient_attention_config": {"swa": {"window_size": 7}}}, "layer_types needs jet"),
        ({"use_mrope": True}, "use_mrope=True"),
        ({"mystery": 1}, "mystery=1"),
    ],
)
def test_refusals_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hf.config_from_hf(JET | change)


def test_models_that_the_family_does_not_express() -> None:
    cfg = preset("jet-tiny")
    for wrong, message in (
        (cfg.replace(norm_cast="first"), "norm_cast"),
        (cfg.replace(pattern="JJ*-"), "pattern"),
        (preset("qwen3_0_6b").replace(norm_cast="last"), "attention.qk_norm"),
    ):
        with pytest.raises(ConfigError, match=f"jet_nemotron cannot express this model: {message}"):
            hf.config_to_hf(wrong, "jet_nemotron")


def _shapes() -> dict[str, tuple[int, ...]]:
    places = hf.tensor_names(hf.config_from_hf(JET), "jet_nemotron")
    return {place.name: place.shape for place in places}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_disk_to_disk_is_bit_exact(dtype: str, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", JET, _shapes(), seed=3)
    tensors = {
        name: v.astype(jnp.dtype(dtype)) for name, v in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = hf.load(source)
    hf.save(model, tmp_path / "copy", dtype=hf.tensor_dtypes(source))
    again = load_file(tmp_path / "copy" / "model.safetensors")
    assert {n: (v.dtype, v.shape, v.tobytes()) for n, v in again.items()} == {
        n: (v.dtype, v.shape, v.tobytes()) for n, v in tensors.items()
    }
    assert hf.load(tmp_path / "copy").cfg == model.cfg
    # Row channel * 4 + tap there, tap-major here.
    stored = tensors["model.layers.3.self_attn.dynamic_conv1d.kernel_generator.w2.weight"]
    ours = flatten(model.params)["layers.6.mixer.generator.w2.weight"].reshape(-1, 4, 48)
    np.testing.assert_array_equal(ours[:, 1, 5], stored[5 * 4 + 1].astype(ours.dtype))


def _torch_jet() -> Any:
    """JetBlock in torch with the released names, around transformers' own delta rule."""
    import torch
    from torch import nn
    from torch.nn import functional as F
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    section = JET["efficient_attention_config"]["jet"]
    heads, dk, k = section["num_heads"], section["head_dim"], section["conv_size"]
    width, dv = JET["hidden_size"], round(section["head_dim"] * section["expand_v"])
    hidden = heads * dv // section["dconv_generator_reduction"]

    class TorchJet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, size in zip("qkvbag", (heads * dk, heads * dk, heads * dv, heads, heads, heads * dv)):
                setattr(self, f"{name}_proj", nn.Linear(width, size, bias=False))
            self.o_proj = nn.Linear(heads * dv, width, bias=False)
            self.A_log, self.dt_bias = (nn.Parameter(torch.zeros(heads)) for _ in range(2))
            w1 = nn.Linear(width, hidden, bias=False)
            generator = OrderedDict(w1=w1, act=nn.SiLU(), w2=nn.Linear(hidden, heads * dv * k))
            self.dynamic_conv1d = nn.ModuleDict({"kernel_generator": nn.Sequential(generator)})
            self.o_norm = nn.RMSNorm(dv, eps=float(section["norm_eps"]))

        def forward(self, hidden_states: Any, **_: Any) -> Any:
            x = hidden_states
            shape = (*x.shape[:2], heads, -1)
            q, key = (F.silu(p(x)).reshape(shape) for p in (self.q_proj, self.k_proj))
            kernels = self.dynamic_conv1d["kernel_generator"](x).reshape(*x.shape[:2], heads * dv, k)
            u = F.pad(self.v_proj(x), (0, 0, k - 1, 0)).unfold(1, k, 1)
            v = F.silu((u * kernels).sum(-1)).reshape(shape)
            g = -self.A_log.exp() * F.softplus(self.a_proj(x) + self.dt_bias)
            o, _ = torch_recurrent_gated_delta_rule(
                q, key, v, g=g, beta=self.b_proj(x).sigmoid(), use_qk_l2norm_in_kernel=True
            )
            o = self.o_norm(o) * F.silu(self.g_proj(x).reshape(shape))
            return self.o_proj(o.flatten(2)), None

    return TorchJet()


def _expected(seed: int) -> tuple[dict[str, np.ndarray], Expected]:
    """Stored tensors, and what Qwen2 with JetBlocks in the place of some attention layers makes of them."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    kinds = {"jet": "full_attention", "attn": "full_attention", "swa": "sliding_attention"}
    shared = {name: JET[name] for name in JET if name.startswith(("num_", "hidden", "rms", "rope_theta"))}
    config = Qwen2Config(
        vocab_size=VOCAB,
        head_dim=JET["head_dim"],
        intermediate_size=JET["intermediate_size"],
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=JET["efficient_attention_config"]["swa"]["window_size"],
        max_window_layers=0,
        layer_types=[kinds[kind] for kind in JET["layer_types"]],
        **shared,
    )
    model = Qwen2ForCausalLM(config).eval()
    for layer, kind in zip(model.model.layers, JET["layer_types"]):
        if kind == "jet":
            layer.self_attn = _torch_jet()
    tensors = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensors[name] = weight(name, tuple(parameter.shape), seed)
            parameter.copy_(torch.from_numpy(tensors[name]))
    tokens = prompt(seed)

    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.as_tensor(ids), use_cache=False).logits.numpy()

    text, gaps = tokens[:1], []
    for _ in range(16):
        last = logits(text)[0, -1]
        low, high = np.sort(last)[-2:]
        gaps.append(high - low)
        text = np.concatenate([text, [[int(last.argmax())]]], axis=1)
    greedy = text[0, tokens.shape[1] :]
    return tensors, Expected(tokens, logits(tokens), greedy, np.array(gaps, np.float32))


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_qwen2_with_jet_blocks_agrees(tmp_path: Path) -> None:
    """Prefill, cached decode and greedy tokens of all three kinds of layer; planted errors do not."""
    tensors, expected = _expected(seed=7)
    (tmp_path / "config.json").write_text(json.dumps(JET))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = hf.load(tmp_path)
    error = check_prefill(model, expected)
    cached, ties = check_cached(model, expected)
    print(f"jet_nemotron: prefill {error:.1e}, cached {cached:.1e}, near ties {ties}")
    assert surviving(model, expected) == []

    def channel_major(path: str, value: jax.Array) -> jax.Array:
        if not path.endswith("generator.w2.weight"):
            return value
        return value.reshape(len(value), -1, 4).swapaxes(1, 2).reshape(value.shape)

    with pytest.raises(AssertionError, match="max difference"), pytest.MonkeyPatch.context() as patch:
        check_prefill(_params(channel_major)(model, patch), expected)
