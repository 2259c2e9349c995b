"""A few queries a row over a long past, without gradients."""
