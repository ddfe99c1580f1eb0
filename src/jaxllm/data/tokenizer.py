"""Byte-level BPE tokenizers: trained here or loaded from a Hugging Face `tokenizer.json`."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.data.detokenize import StreamDecoder, byte_level_characters, is_byte_level, token_to_bytes
from jaxllm.data.errors import DataError
from jaxllm.data.store import cache_folder, write_atomically

DEFAULT_VOCAB_SIZE = 4096
# In the order of their ids: 0, 1, 2, as in Nemotron-H.
PAD, BOS, EOS = "<pad>", "<s>", "</s>"

# A part of the cache key: raise it when `Tokenizer.train` changes what it makes.
_RECIPE = 1


class Tokenizer:
    """Text to token ids and back.

    Text is never parsed for special tokens unless asked: a document that contains "</s>" is encoded as these characters.

    Attributes:
        bos_id: begin of document, or None.
        eos_id: end of document, or None.
        pad_id: padding, or None.
        config: content of the `tokenizer_config.json` beside the file that this was loaded from; else empty.
    """

    def __init__(
        self,
        backend: Any,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        config: dict[str, Any] | None = None,
    ):
        """Wraps a `tokenizers.Tokenizer`."""
        backend.no_padding()
        backend.no_truncation()
        self._json = backend.to_str()
        self._parsing = backend
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.config = config or {}

    @cached_property
    def _plain(self) -> Any:
        # A second one, because the switch is a state of the backend and not an argument of its calls.
        plain = type(self._parsing).from_str(self._json)
        plain.encode_special_tokens = True
        return plain

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = DEFAULT_VOCAB_SIZE) -> "Tokenizer":
        """Trains a byte-level BPE that has every byte, so that any text round-trips.

        Args:
            texts: documents.
            vocab_size: entries, with the 3 special tokens and 256 bytes; a small corpus may give fewer.

        Raises:
            DataError: the vocabulary has no room for the bytes.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        specials = [PAD, BOS, EOS]
        least = 256 + len(specials)
        if vocab_size < least:
            raise DataError(
                f"vocab_size: got {vocab_size}; allowed are {least} (all bytes, 3 special tokens) and more"
            )
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend, pad_id=0, bos_id=1, eos_id=2)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Loads a `tokenizer.json`, or the folder that holds one.

        Special tokens come from the `tokenizer_config.json` beside it, else from the names that `train` gives them.

        Raises:
            DataError: there is no such file, or it is not a tokenizer.
        """
        from tokenizers import Tokenizer as Backend

        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise DataError(
                f"tokenizer: got {str(path)!r}; there is no file {file}; give a tokenizer.json or its folder"
            )
        try:
            backend = Backend.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the backend raises bare Exceptions
            raise DataError(
                f"tokenizer: got {str(file)!r}, which does not read as a Hugging Face tokenizer.json ({error}); "
                "give one that the `tokenizers` package wrote"
            ) from error
        beside = file.with_name("tokenizer_config.json")
        config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        template = file.with_name("chat_template.jinja")
        if template.is_file():
            # The file is the newer form, and wins in transformers too.
            config["chat_template"] = template.read_text(encoding="utf-8")

        def special(role: str, default: str) -> int | None:
            token = config.get(role, None if config else default)
            token = token.get("content") if isinstance(token, dict) else token
            return backend.token_to_id(token) if token else None

        return cls(
            backend,
            bos_id=special("bos_token", BOS),
            eos_id=special("eos_token", EOS),
            pad_id=special("pad_token", PAD),
            config=config,
        )

    def save(self, folder: str | Path) -> Path:
        """Writes `tokenizer.json` and `tokenizer_config.json`, in the form that Hugging Face libraries read.

        Returns:
            The path of the `tokenizer.json`.
        """
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        } | self.config
        config |= {role: self.id_to_token(index) for role, index in names.items() if index is not None}
        write_atomically(Path(folder) / "tokenizer_config.json", json.dumps(config, indent=2).encode())
        return write_atomically(Path(folder) / "tokenizer.json", self._json.encode())

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template that came with the tokenizer; of several, the one that is named "default"."""
        template = self.config.get("chat_template")
        if isinstance(template, list):
            template = {each["name"]: each["template"] for each in template}.get("default")
        return template if isinstance(template, str) else None

    @property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens by their role ("bos_token", ...), as chat templates know them."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        found = {role: self.id_to_token(index) for role, index in ids.items() if index is not None}
        for role in ("unk_token", "sep_token", "cls_token", "mask_token"):
            token = self.config.get(role)
            found[role] = token.get("content") if isinstance(token, dict) else token
        return {role: token for role, token in found.items() if token is not None}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer and its special ids, as hex."""
        ids = f"{self.bos_id},{self.eos_id},{self.pad_id};"
        return hashlib.sha256((ids + self._json).encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """All ids are below this."""
        return max(self._parsing.get_vocab(with_added_tokens=True).values()) + 1

    def id_to_token(self, index: int) -> str | None:
        """The vocabulary's own spelling of a token."""
        return self._parsing.id_to_token(index)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token in the vocabulary's own spelling."""
        return self._parsing.token_to_id(token)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens: zero bytes of text."""
        added = self._parsing.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, parse_special: bool = False
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text.
            bos: put the begin token in front, if there is one.
            eos: put the end token behind, if there is one.
            parse_special: read special tokens' names in `text` as these tokens (chat templates need it).
        """
        return self.encode_batch([text], bos=bos, eos=eos, parse_special=parse_special)[0]

    def encode_batch(
        self, texts: Sequence[str], *, bos: bool = False, eos: bool = False, parse_special: bool = False
    ) -> list[list[int]]:
        """Token ids of several texts, on all cores; arguments as in `encode`."""
        front = [self.bos_id] if bos and self.bos_id is not None else []
        back = [self.eos_id] if eos and self.eos_id is not None else []
        backend = self._parsing if parse_special else self._plain
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [front + encoding.ids + back for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self._parsing.decode([int(index) for index in ids], skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        table = self.token_table if self.is_byte_level else None
        skipped = self.special_ids if skip_special else frozenset()
        return StreamDecoder(lambda ids: self.decode(ids, skip_special=skip_special), table, skipped)

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether tokens spell bytes, so that their byte counts are exact."""
        return is_byte_level(json.loads(self._json))

    @cached_property
    def token_table(self) -> list[bytes]:
        """The bytes that each id stands for; special tokens spell their names."""
        characters = byte_level_characters() if self.is_byte_level else None
        return [token_to_bytes(self.id_to_token(index), characters) for index in range(self.vocab_size)]

    @cached_property
    def newline_ids(self) -> frozenset[int]:
        """Ids whose text has a newline."""
        spelt = {index for index, text in enumerate(self.token_table) if b"\n" in text}
        return frozenset(spelt - self.special_ids)

    @cached_property
    def token_byte_lengths(self) -> np.ndarray:
        """int32[V]; UTF-8 bytes of text that each id stands for; 0 for special tokens.

        Exact for byte-level vocabularies; for others, the length of the token's spelling, which can differ from the
        text by what their normaliser adds or takes away.
        """
        lengths = np.array([len(token) for token in self.token_table], np.int32)
        lengths[list(self.special_ids)] = 0
        return lengths

    def token_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """UTF-8 bytes of text that the ids stand for."""
        return int(self.token_byte_lengths[np.asarray(ids, np.int64)].sum())


def trained_tokenizer(
    texts: Sequence[str],
    corpus_sha256: str,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    cache: str | Path | None = None,
) -> Tokenizer:
    """The tokenizer trained on a corpus, from the cache where it stands there.

    Args:
        texts: the training documents.
        corpus_sha256: hash of the training documents.
        vocab_size: entries.
        cache: cache folder; None: the user's.
    """
    import tokenizers

    key = f"{_RECIPE}:{corpus_sha256}:{vocab_size}:{tokenizers.__version__}"
    path = cache_folder("tokenizers", cache) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if path.is_file():
        try:
            return Tokenizer.load(path)
        except DataError:
            path.unlink(missing_ok=True)
    tokenizer = Tokenizer.train(texts, vocab_size)
    write_atomically(path, tokenizer._json.encode())
    return tokenizer
