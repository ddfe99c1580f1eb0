"""Arrays that stay where they are stored until they are asked for, so that a model can be converted piece by piece."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Deferred:
    """An array that is read anew whenever it is wanted, and kept by nobody but who asked.

    Attributes:
        shape: of the array.
        dtype: of the array.
        read: makes it in a given dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[np.dtype], np.ndarray]

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the array once it is there."""
        return self.size * self.dtype.itemsize

    def value(self) -> np.ndarray:
        """The array.

        Raises:
            ValueError: what was read has another shape or dtype.
        """
        array = self.read(self.dtype)
        if (array.shape, array.dtype) != (self.shape, self.dtype):
            raise ValueError(f"read {array.dtype}{array.shape}, expected {self.dtype}{self.shape}")
        return array

    def astype(self, dtype: Any) -> "Deferred":
        """The same values in another dtype, without an array of this one on the way."""
        return Deferred(self.shape, np.dtype(dtype), self.read)
