"""Element types: their safetensors names, torch names, sizes, and how NumPy carries them.

Tensors travel as unsigned integers of the same width (`carrier`), so that no value is ever touched
on its way; only a cast looks at values (`values`), through ml_dtypes for what NumPy lacks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    name: str
    """Name in a safetensors header: "BF16"."""
    torch: str
    """Name in torch, without "torch.": "bfloat16"."""
    itemsize: int
    """Bytes per element."""
    rank: int
    """Place in the order of `Dtype` in safetensors/src/tensor.rs: files hold higher ranks first."""
    is_float: bool

    @property
    def carrier(self) -> np.dtype[np.generic]:
        """NumPy type that moves the bits unseen."""
        return np.dtype(f"u{self.itemsize}")

    @property
    def values(self) -> np.dtype[np.generic]:
        """NumPy type that computes with the values."""
        if self.name in _ML_DTYPES:
            import ml_dtypes  # only casts need it

            scalar: type[np.generic] = getattr(ml_dtypes, _ML_DTYPES[self.name])
            return np.dtype(scalar)
        return np.dtype(self.torch)


_ML_DTYPES = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}

# Ordered as in safetensors/src/tensor.rs `enum Dtype`, so that `rank` sorts as the library does.
_ALL = (
    ("BOOL", "bool", 1, False),
    ("U8", "uint8", 1, False),
    ("I8", "int8", 1, False),
    ("F8_E5M2", "float8_e5m2", 1, True),
    ("F8_E4M3", "float8_e4m3fn", 1, True),
    ("I16", "int16", 2, False),
    ("U16", "uint16", 2, False),
    ("F16", "float16", 2, True),
    ("BF16", "bfloat16", 2, True),
    ("I32", "int32", 4, False),
    ("U32", "uint32", 4, False),
    ("F32", "float32", 4, True),
    ("F64", "float64", 8, True),
    ("I64", "int64", 8, False),
    ("U64", "uint64", 8, False),
)

BY_NAME = {
    name: DType(name, torch, size, rank, is_float)
    for rank, (name, torch, size, is_float) in enumerate(_ALL)
}
BY_TORCH = {dtype.torch: dtype for dtype in BY_NAME.values()}
BF16, F16, F32 = BY_NAME["BF16"], BY_NAME["F16"], BY_NAME["F32"]
