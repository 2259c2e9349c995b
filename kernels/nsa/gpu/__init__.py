"""The operation on a GPU, in Triton: forward and backward."""
