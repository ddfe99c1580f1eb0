"""Matrix products with weights in 4 or 8 bits and a scale per group of inputs, and with activations in 8 bits."""

from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.atom import (
    AtomRows,
    AtomWeight,
    atom_matmul,
    outliers_last,
    quantize_atom_rows,
    quantize_atom_weight,
)
from pallas_kernels.quantized_matmul.codes import (
    QuantizedRows,
    QuantizedWeight,
    dequantize_rows,
    dequantize_weight,
    pack_codes,
    quantize_rows,
    quantize_weight,
    unpack_codes,
)
from pallas_kernels.quantized_matmul.nvfp4 import quantize_nvfp4

__all__ = [
    "AtomRows",
    "AtomWeight",
    "QuantizedRows",
    "QuantizedWeight",
    "atom_matmul",
    "dequantize_rows",
    "dequantize_weight",
    "outliers_last",
    "pack_codes",
    "quantize_atom_rows",
    "quantize_atom_weight",
    "quantize_nvfp4",
    "quantize_rows",
    "quantize_weight",
    "quantized_matmul",
    "unpack_codes",
]
