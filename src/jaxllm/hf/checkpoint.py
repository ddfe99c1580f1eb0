"""Load and save Hugging Face folders."""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import Precision, require
from jaxllm.hf.config import choose_family, config_from_hf, config_to_hf, family_of
from jaxllm.hf.deferred import Deferred
from jaxllm.hf.names import Stored, disk_name, tensor_names
from jaxllm.hf.tensors import (
    DTYPES,
    CheckpointError,
    Entry,
    Output,
    read_headers,
    read_tensors,
    write_tensors,
)
from jaxllm.model.functional import LanguageModel, abstract_params, flatten, map_named

MAX_SHARD_BYTES = 5 * 10**9
# What an export may replace in a folder that exists.
OWN_FILES = re.compile(
    r"config\.json|generation_config\.json|tokenizer(_config)?\.json|chat_template\.jinja"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)
QUANTISED = "hf_quant_config.json"
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a folder; a ``hf_quant_config.json`` beside it becomes its ``quantization_config``.

    Raises:
        CheckpointError: no such folder, no config.json, or no JSON object in a file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder")
    file = folder / "config.json"
    if not file.is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{folder}: has no config.json (found {found}); give the folder of a Hugging Face model"
        )
    data = _json(file)
    if data.get("quantization_config") is None and (folder / QUANTISED).is_file():
        # ModelOpt's FP8 and NVFP4 folders say it in a file of their own.
        data["quantization_config"] = _json(folder / QUANTISED).get("quantization") or {}
    return data


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: is no JSON object")
    return data


def read_generation_config(folder: str | Path) -> dict[str, Any]:
    """generation_config.json over the token ids of config.json: bos_token_id, eos_token_id (int or list), ..."""
    config = read_config(folder)
    ids = {
        key: config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config.get(key) is not None
    }
    file = Path(folder) / "generation_config.json"
    return ids | (json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})


def tensor_dtypes(folder: str | Path) -> dict[str, str]:
    """Tensor name to dtype ("float32", "bfloat16", "float16") of a folder: give it to :func:`save` to store alike."""
    return {
        name: TORCH_NAMES.get(entry.dtype, entry.dtype) for name, entry in read_headers(Path(folder)).items()
    }


def _match(folder: Path, wanted: Iterable[Stored], entries: Mapping[str, Entry], tied: bool) -> None:
    """Compare the tensors that the model needs with those on disk.

    Raises:
        CheckpointError: missing, extra and misshapen tensors and unknown dtypes, all of them.
    """
    names = {stored.name: stored for stored in wanted}
    allowed = set(names) | ({"lm_head.weight"} if tied else set())
    problems = [f"missing: {name} {list(names[name].shape)}" for name in names if name not in entries]
    problems += [f"extra: {name} {list(entries[name].shape)}" for name in sorted(set(entries) - allowed)]
    for name in names:
        if name in entries and entries[name].shape != names[name].shape:
            given, needed = list(entries[name].shape), list(names[name].shape)
            problems.append(f"shape: {name} is {given} on disk, {needed} by config.json")
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            problems.append(
                f"dtype: {name} is {entry.dtype}; jaxllm reads {', '.join(DTYPES)}: give a checkpoint that is not quantised"
            )
    if problems:
        raise CheckpointError(
            "\n  ".join([f"{folder}: the weights are not those of config.json:", *problems])
        )


def _precision(entries: Mapping[str, Entry]) -> Precision:
    """bfloat16 where most of the weights are stored so, else float32."""
    size = {True: 0, False: 0}
    for entry in entries.values():
        size[entry.dtype == "BF16"] += int(np.prod(entry.shape, dtype=np.int64))
    return Precision(param="bfloat16", compute="bfloat16") if size[True] > size[False] else Precision()


def load(folder: str | Path, precision: Precision | None = None, *, deferred: bool = False) -> LanguageModel:
    """A model from a Hugging Face folder (config.json, safetensors, tokenizer.json where there is one).

    Everything is checked from the headers before the first tensor is read; then tensors are read one at a time.

    Args:
        folder: local folder; nothing is downloaded.
        precision: None takes bfloat16 for checkpoints stored so, float32 otherwise.
        deferred: leave the tensors on disk: parameters are :class:`jaxllm.hf.deferred.Deferred`, each read when it is
            wanted. For conversions; :func:`save` takes such a model.

    Raises:
        ConfigError: config.json has something that jaxllm does not understand or support.
        CheckpointError: files are missing or broken, or tensors are missing, extra or misshapen (all are listed).
    """
    folder = Path(folder)
    data = read_config(folder)
    cfg, family = config_from_hf(data), family_of(data)
    entries: dict[str, Entry] = {}
    for name, entry in read_headers(folder).items():
        entries[disk_name(name, family)] = entry
    wanted = tensor_names(cfg, family)
    _match(folder, wanted, entries, cfg.tie_embeddings)
    cfg = cfg.replace(precision=precision or _precision(entries))
    abstract = flatten(abstract_params(cfg))
    values = _deferred(wanted, entries, abstract) if deferred else _values(wanted, entries, abstract)
    if cfg.tie_embeddings and "lm_head.weight" in entries:
        _check_tied(folder, entries, next(place.name for place in wanted if place.path == "embed.weight"))
    params = map_named(lambda path, _: values[path], abstract_params(cfg))
    tokenizer = _load_tokenizer(folder)
    template = tokenizer.chat_template if tokenizer is not None else None
    return LanguageModel(cfg=cfg, params=params, tokenizer=tokenizer, chat_template=template)


def _values(
    wanted: list[Stored], entries: Mapping[str, Entry], abstract: Mapping[str, Any]
) -> dict[str, Any]:
    """Parameters by path, read tensor by tensor; the parts of stacked experts are put where they belong."""
    place_of = {entries[place.name].name: place for place in wanted}
    missing = Counter(place.path for place in wanted)
    parts: dict[str, np.ndarray] = {}
    values = {}
    for entry, array in read_tensors(entries[place.name] for place in wanted):
        place = place_of[entry.name]
        path = place.path
        missing[path] -= 1
        _put(parts, place, array, abstract[path])
        if missing[path] == 0:
            values[path] = jnp.asarray(parts.pop(path))
    return values


def _put(
    parts: dict[str, np.ndarray], place: Stored, array: np.ndarray, leaf: Any, dtype: Any = None
) -> None:
    """Put one stored tensor where it belongs in its parameter, of the shape and, unless told, the dtype of ``leaf``."""
    # Through the model's own dtype, whatever is asked for: a parameter has one value.
    array = place.layout.load(array).astype(leaf.dtype, copy=False)
    dtype = leaf.dtype if dtype is None else dtype
    if place.index:
        if place.path not in parts:
            parts[place.path] = np.empty(leaf.shape, dtype)
        parts[place.path][place.index] = array
    else:
        # In C order, since a view of a transposed buffer would keep that alive; in one step, since a transposed head in
        # another dtype would be there twice otherwise.
        parts[place.path] = array.astype(dtype, order="C", copy=False)


def _deferred(
    wanted: list[Stored], entries: Mapping[str, Entry], abstract: Mapping[str, Any]
) -> dict[str, Deferred]:
    """As :func:`_values`, but each parameter is read when it is wanted."""
    places: dict[str, dict[str, Stored]] = {}
    for place in wanted:
        places.setdefault(place.path, {})[entries[place.name].name] = place

    def read(path: str, dtype: np.dtype) -> np.ndarray:
        parts: dict[str, np.ndarray] = {}
        for entry, array in read_tensors(entries[place.name] for place in places[path].values()):
            _put(parts, places[path][entry.name], array, abstract[path], dtype)
        return parts[path]

    return {
        path: Deferred(leaf.shape, np.dtype(leaf.dtype), partial(read, path))
        for path, leaf in abstract.items()
    }


def _check_tied(folder: Path, entries: Mapping[str, Entry], embedding: str) -> None:
    pair = [array for _, array in read_tensors([entries["lm_head.weight"], entries[embedding]])]
    if pair[0].shape != pair[1].shape or not np.array_equal(pair[0], pair[1]):
        raise CheckpointError(
            f"{folder}: config.json ties the head to the embedding, but lm_head.weight differs from {embedding}; "
            "set tie_word_embeddings to false"
        )


def _load_tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer.json").is_file():
        return None
    from jaxllm.data.tokenizer import Tokenizer

    return Tokenizer.load(folder)


def save(
    model: LanguageModel,
    folder: str | Path,
    *,
    family: str | None = None,
    dtype: str | Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a Hugging Face folder that transformers loads; it appears whole or not at all.

    The logits in transformers are those of the model, with two things to know of Nemotron-H: its class clamps dt from
    below in prefill, which ``time_step_min`` in config.json is set to undo; and it cannot tie the head, so a tied
    model is written with the head's tensor as well.

    Args:
        model: configuration, plain array parameters (or deferred ones: one is in memory at a time), tokenizer if any.
        folder: made if it is not there; an earlier export in it is replaced.
        family: "nemotron_h", "mamba2", "llama", "qwen2", "qwen3", "mixtral", "qwen3_moe" or "jet_nemotron" (whose code
            is on the hub, not in transformers); None takes the one that expresses the model.
        dtype: "float32", "bfloat16" or "float16" for all tensors; or tensor name to dtype (:func:`tensor_dtypes`); None
            keeps each parameter's own.
        max_shard_bytes: larger models are split, with an index.

    Returns:
        The folder.

    Raises:
        ConfigError: the family cannot express the model.
        CheckpointError: ``folder`` holds files that no export writes, or a dtype is unknown.
    """
    require(not model.cfg.scan_layers, "model.cfg.scan_layers", True, "use functional.unstack first")
    folder = Path(folder)
    family = family or choose_family(model.cfg)
    config = config_to_hf(model.cfg, family)
    outputs = _outputs(model, family, dtype)
    stored = max(outputs, key=lambda output: output.nbytes).dtype.name
    ids = _special_ids(model)
    config |= {"dtype": stored, "torch_dtype": stored} | ids
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        (fresh / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        generation = {"_from_model_config": True} | {k: v for k, v in ids.items() if v is not None}
        (fresh / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
        if model.tokenizer is not None:
            model.tokenizer.save(fresh)
        if model.chat_template is not None:
            (fresh / "chat_template.jinja").write_text(model.chat_template, encoding="utf-8")
        write_tensors(fresh, outputs, max_shard_bytes)
        _swap(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return folder


def _outputs(model: LanguageModel, family: str, dtype: str | Mapping[str, str] | None) -> list[Output]:
    params = flatten(model.params)
    places = tensor_names(model.cfg, family)
    paths = {place.path for place in places}
    if set(params) != paths:
        differ = ", ".join(sorted(set(params) ^ paths)[:4])
        raise CheckpointError(
            f"params: not the plain arrays of cfg ({differ}); merge adapters and quantised weights first"
        )
    if model.cfg.tie_embeddings and family == "nemotron_h":
        # transformers' class has no tying: without the tensor it would make up a random head.
        params["lm_head.weight"] = params["embed.weight"]
        embedding = next(place for place in places if place.path == "embed.weight")
        places.append(replace(embedding, path="lm_head.weight", name="lm_head.weight"))
    wanted = {name: next(d for d in DTYPES.values() if d.name == name) for name in TORCH_NAMES.values()}

    def dtype_of(name: str, own: Any) -> np.dtype:
        given = dtype.get(name) if isinstance(dtype, Mapping) else dtype
        given = jnp.dtype(own).name if given is None else given
        if given not in wanted:
            raise CheckpointError(f"dtype={given!r}: allowed are {', '.join(wanted)}")
        return wanted[given]

    held: dict[str, np.ndarray] = {}

    def value(place: Stored) -> np.ndarray:
        array = params[place.path]
        if isinstance(array, Deferred):
            # The parts of a parameter are written one after the other: it is read for the first of them.
            if place.path not in held:
                held.clear()
                held[place.path] = array.value()
            array = held[place.path]
        return place.layout.store(np.asarray(jax.device_get(array[place.index] if place.index else array)))

    return [
        Output(
            place.name,
            place.shape,
            dtype_of(place.name, params[place.path].dtype),
            lambda place=place: value(place),
        )
        for place in places
    ]


def _special_ids(model: LanguageModel) -> dict[str, int | None]:
    t = model.tokenizer
    names = {"bos_token_id": "bos_id", "eos_token_id": "eos_id", "pad_token_id": "pad_id"}
    return {key: None if t is None else getattr(t, name) for key, name in names.items()}


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file")
    foreign = (
        sorted(p.name for p in folder.iterdir() if not OWN_FILES.fullmatch(p.name)) if folder.is_dir() else []
    )
    if foreign:
        raise CheckpointError(
            f"{folder}: holds {', '.join(foreign[:5])}, which an export would delete; give another folder"
        )


def _swap(fresh: Path, folder: Path) -> None:
    """Put ``fresh`` in the place of ``folder``."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(fresh, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
