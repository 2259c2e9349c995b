"""Model cards, from measured results only."""
