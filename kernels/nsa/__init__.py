"""Native Sparse Attention as an operation: PyTorch and Triton only. Imported as `nsa_hf.kernels`."""

from .attention import BACKENDS, nsa_attention
from .compression import (
    COMPRESSORS,
    LearnedCompressor,
    LinearCompressor,
    MeanCompressor,
    MLPCompressor,
    ZeroLinear,
    build_compressor,
    compress,
    compress_blocks,
)
from .exported import exported_attention
from .index_keys import dequantize_index_keys, quantize_index_keys
from .operators import is_exporting
from .placement import Placement
from .recomputation import choosing_once
from .reference import reference_attention
from .sizes import Sizes, n_blocks

__all__ = [
    "BACKENDS",
    "COMPRESSORS",
    "LearnedCompressor",
    "LinearCompressor",
    "MLPCompressor",
    "MeanCompressor",
    "Placement",
    "Sizes",
    "ZeroLinear",
    "build_compressor",
    "choosing_once",
    "compress",
    "compress_blocks",
    "dequantize_index_keys",
    "exported_attention",
    "is_exporting",
    "n_blocks",
    "nsa_attention",
    "quantize_index_keys",
    "reference_attention",
]
