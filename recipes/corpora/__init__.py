"""Real English text and code from Debian's packages: `python -m nsa_hf.recipes.corpora OUT`."""
