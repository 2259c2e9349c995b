"""PyTorch's dense attentions that hold no matrix of all weights, by the names that figures have."""

from __future__ import annotations

from torch.nn.attention import SDPBackend

DENSE_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
