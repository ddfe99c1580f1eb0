"""Reading a config.json so that nothing in it goes unnoticed: a field is read, checked, known harmless or an error."""

import math
from typing import Any

from jaxllm.config import ConfigError

# Fields that cannot change the logits of a forward pass in evaluation mode, by the reason why.
_HARMLESS = {
    "where the file comes from, what wrote it, how the weights are stored": """
        architectures model_type auto_map transformers_version torch_dtype dtype _name_or_path name_or_path
        _commit_hash""",
    "special tokens and generation: they are read from the tokenizer and generation_config.json": """
        bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id
        forced_eos_token_id use_cache num_logits_to_keep""",
    "what transformers' models return and how they slice their work": """
        return_dict output_attentions output_hidden_states output_router_logits torchscript chunk_size_feed_forward
        is_encoder_decoder is_decoder tie_encoder_decoder""",
    "labels of classification heads": "id2label label2id num_labels problem_type finetuning_task task_specific_params",
    "training only: dropout and initialisation": """
        attention_dropout hidden_dropout residual_dropout embd_pdrop rescale_prenorm_residual time_step_min
        time_step_max time_step_floor mamba_dt_min mamba_dt_max mamba_dt_init_floor time_step_rank
        router_aux_loss_coef router_jitter_noise""",
    "the longest sequence meant; no position table depends on it": "max_position_embeddings",
    "early Llama's emulation of tensor parallelism: the same products in slices": "pretraining_tp",
    "which kernels to use": "use_mamba_kernels _attn_implementation attn_implementation use_bfloat16",
}
HARMLESS = frozenset(name for names in _HARMLESS.values() for name in names.split())


def number(value: Any) -> float:
    """A JSON number, also as transformers writes infinities: ``Infinity``, 1e308 or {"__float__": "Infinity"}.

    Raises:
        ConfigError: no number.
    """
    value = value.get("__float__", value) if isinstance(value, dict) else value
    try:
        value = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{value!r}: is not a number") from None
    # 1e308 stands for infinity in files that must be strict JSON.
    return math.inf if value >= 1e300 else value


class Fields:
    """One config.json, read field by field; ``null`` counts as absent."""

    def __init__(self, data: dict[str, Any], family: str):
        self.data = data
        self.family = family
        self._seen: set[str] = set()

    def get(self, name: str, default: Any = None, *, old: tuple[str, ...] = ()) -> Any:
        """The value of ``name``, else of the first of its ``old`` spellings that is there, else ``default``."""
        self._seen.update((name, *old))
        return next((self.data[n] for n in (name, *old) if self.data.get(n) is not None), default)

    def need(self, name: str, *, old: tuple[str, ...] = ()) -> Any:
        """As :meth:`get`, without a default.

        Raises:
            ConfigError: the field is absent.
        """
        value = self.get(name, old=old)
        if value is None:
            spellings = " or ".join((name, *old))
            raise ConfigError(f"{name}: missing; the config.json of a {self.family} model needs {spellings}")
        return value

    def only(
        self, name: str, allowed: Any, why: str, *, default: Any = None, old: tuple[str, ...] = ()
    ) -> None:
        """Check a field for which jaxllm supports one value.

        Raises:
            ConfigError: another value.
        """
        default = allowed if default is None else default
        value = self.get(name, default, old=old)
        if value != allowed:
            raise ConfigError(f"{name}={value!r}: unsupported, {why}; supported is {allowed!r}")

    def skip(self, *names: str) -> None:
        """Fields that this family's forward pass does not read."""
        self._seen.update(names)

    def finish(self) -> None:
        """Check that every field was accounted for.

        Raises:
            ConfigError: unknown fields, all of them.
        """
        unknown = sorted(set(self.data) - self._seen - HARMLESS)
        if unknown:
            listed = ", ".join(f"{name}={self.data[name]!r}" for name in unknown)
            raise ConfigError(
                f"unknown fields in the config.json of a {self.family} model: {listed}. They may change what the model "
                "computes, so it is not loaded; remove a field only if you know that it does not"
            )
