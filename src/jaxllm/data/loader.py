"""Batches in a deterministic endless order, resumable to the exact next one, readable in slices by any process."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxllm.batch import PackedBatch
from jaxllm.data.errors import DataError, LoaderStateError
from jaxllm.data.packing import ENDLESS, RowSource, empty_row
from jaxllm.data.tokens import TokenCorpus
from jaxllm.data.unread import UnreadBatch


class _Share:
    """The rows of one process, in the order in which it reads them: its slice of each global batch."""

    def __init__(self, rows: RowSource, batch_size: int, process_index: int, process_count: int):
        if batch_size < 1 or process_count < 1 or batch_size % process_count:
            raise DataError(
                f"batch_size: got {batch_size} rows for {process_count} processes; it must be a positive multiple of "
                "the number of processes"
            )
        if not 0 <= process_index < process_count:
            raise DataError(f"process_index: got {process_index}; allowed are 0 to {process_count - 1}")
        self.rows, self.batch_size = rows, batch_size
        self.local = batch_size // process_count
        self.first = process_index * self.local

    def __len__(self) -> int:
        return ENDLESS // self.batch_size * self.local

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step, row = divmod(int(index), self.local)
        return self.rows[step * self.batch_size + self.first + row]


class Loader:
    """Endless training batches, built on Grain.

    Batch s holds the global rows s * batch_size .. (s + 1) * batch_size - 1 of `RowSource`; process p reads the p-th of
    `process_count` equal slices of them. What a batch holds does not depend on how many processes read, on prefetching,
    or on where a run was stopped and resumed.
    """

    def __init__(
        self,
        tokens: TokenCorpus,
        batch_size: int,
        seq_len: int,
        *,
        seed: int = 0,
        depths: int = 1,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 0,
    ):
        """Stands before step 0.

        Args:
            tokens: the training corpus.
            batch_size: rows of the global batch.
            seq_len: T, tokens per row.
            seed: of the epochs' orders.
            depths: Q; targets 1 .. Q steps ahead.
            process_index: which slice of the global batch this process reads.
            process_count: number of slices.
            prefetch: batches made ahead by a background thread; 0: none, and no thread.
        """
        self.rows = RowSource(tokens, seq_len, seed=seed, depths=depths)
        self._share = _Share(self.rows, batch_size, process_index, process_count)
        self._prefetch = prefetch
        self._step = 0
        self._iterator: Any = None
        self._dataset: Any = None

    @property
    def step(self) -> int:
        """The step whose batch comes next."""
        return self._step

    @property
    def epoch(self) -> float:
        """Passes over the corpus before the next batch, in (fractional) epochs."""
        return self._step * self._share.batch_size / self.rows.rows_per_epoch

    @property
    def steps_per_epoch(self) -> float:
        """Steps in one pass over the corpus; epochs need not end where a batch ends."""
        return self.rows.rows_per_epoch / self._share.batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self._share.batch_size * self.rows.seq_len

    @property
    def batch_size(self) -> int:
        """Rows of the global batch."""
        return self._share.batch_size

    def rows_at(self, step: int, rows: Iterable[int]) -> PackedBatch:
        """Any rows of the global batch of a step, NumPy leaves; -1 stands for padding. Does not move the loader."""
        first = step * self.batch_size
        found = [
            empty_row(self.rows.seq_len, self.rows.depths) if row < 0 else self.rows[first + int(row)]
            for row in rows
        ]
        return PackedBatch(**{name: np.stack([row[name] for row in found]) for name in found[0]})

    def _batches(self) -> Any:
        if self._dataset is None:
            # Over a second of import, and not needed by those who only import the library.
            import grain

            source = grain.MapDataset.source(self._share)
            self._dataset = source.batch(self._share.local).map(lambda rows: PackedBatch(**rows))
        return self._dataset

    def batch_at(self, step: int) -> PackedBatch:
        """This process's slice of batch `step`, with NumPy leaves; does not move the loader."""
        if step < 0:
            raise DataError(f"step: got {step}; steps count from 0")
        return self._batches()[step]

    def __iter__(self) -> Iterator[PackedBatch]:
        return self

    def __next__(self) -> PackedBatch:
        """The next batch: this process's rows, NumPy leaves."""
        if self._iterator is None:
            import grain

            options = grain.ReadOptions(
                num_threads=1 if self._prefetch else 0, prefetch_buffer_size=self._prefetch
            )
            self._iterator = iter(self._batches()[self._step :].to_iter_dataset(options))
        batch = next(self._iterator)
        self._step += 1
        return batch

    def next_unread(self) -> UnreadBatch:
        """The next batch, all of its rows whatever the process, its tokens still to be read where they are wanted."""
        # What was read ahead is of another step then.
        self.close()
        first = self._step * self.batch_size
        self._step += 1
        return UnreadBatch.of(self.rows, range(first, first + self.batch_size))

    def close(self) -> None:
        """Stops the prefetch thread, if there is one; the loader can go on afterwards."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _identity(self) -> dict[str, int | str]:
        return {
            "corpus": self.rows.corpus.fingerprint,
            "batch_size": self._share.batch_size,
            "seq_len": self.rows.seq_len,
            "seed": self.rows.seed,
            "depths": self.rows.depths,
        }

    def state(self) -> dict[str, int | str]:
        """What `restore` needs to go on with the exact next batch: plain JSON values, the same in every process."""
        return {"step": self._step, **self._identity()}

    def restore(self, state: dict[str, int | str]) -> None:
        """Goes to the place in the data where `state` was taken, whatever the number of processes then and now.

        Raises:
            LoaderStateError: the state is of another corpus or other settings.
        """
        identity = self._identity()
        wrong = [
            f"{name} was {state.get(name)}, is {value}"
            for name, value in identity.items()
            if state.get(name) != value
        ]
        step = state.get("step")
        if wrong or not isinstance(step, int) or step < 0:
            raise LoaderStateError(
                f"state: got one that does not fit this loader ({'; '.join(wrong) or f'step is {step}'}); "
                "resume with the data and settings of the first run, or start anew without the state"
            )
        self.close()
        self._step = step


def validation_batches(
    tokens: TokenCorpus,
    batch_size: int,
    seq_len: int,
    *,
    depths: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[PackedBatch]:
    """One pass over a corpus in its own order: every target exactly once, padding (segment 0) at the end.

    Args:
        tokens: the validation corpus.
        batch_size: rows of the global batch.
        seq_len: T, tokens per row.
        depths: Q; targets 1 .. Q steps ahead.
        process_index: which slice of each global batch this process reads.
        process_count: number of slices; every process gets the same number of batches.

    Returns:
        Batches with NumPy leaves.
    """
    rows = RowSource(tokens, seq_len, depths=depths, shuffle=False)
    share = _Share(rows, batch_size, process_index, process_count)

    def batches() -> Iterator[PackedBatch]:
        for first in range(0, rows.rows_per_epoch, batch_size):
            mine = range(first + share.first, first + share.first + share.local)
            picked = [rows[row] if row < rows.rows_per_epoch else empty_row(seq_len, depths) for row in mine]
            yield PackedBatch(**{name: np.stack([row[name] for row in picked]) for name in picked[0]})

    return batches()


def unread_validation_batches(tokens: TokenCorpus, batch_size: int, seq_len: int) -> list[UnreadBatch]:
    """The same as :func:`validation_batches`, every row of every batch, without their tokens."""
    rows = RowSource(tokens, seq_len, shuffle=False)
    index = np.arange(-(-rows.rows_per_epoch // batch_size) * batch_size)
    index = np.where(index < rows.rows_per_epoch, index, -1).reshape(-1, batch_size)
    return [UnreadBatch.of(rows, own) for own in index.tolist()]


def scored_bytes(batch: PackedBatch, token_byte_lengths: np.ndarray) -> int:
    """UTF-8 bytes that the scored next-token targets of a batch stand for.

    Bits per byte are nats * scored tokens / (ln 2 * bytes), nats being the mean over the scored tokens.

    Args:
        batch: with targets i32[B, T, Q] and loss_mask f32[B, T].
        token_byte_lengths: int[V]; `Tokenizer.token_byte_lengths`, 0 for special tokens.
    """
    targets = np.asarray(batch.targets)[..., 0]
    return int(token_byte_lengths[targets[np.asarray(batch.loss_mask) > 0]].sum())
