"""Two models compared: their weights, and what they compute on the same texts."""
