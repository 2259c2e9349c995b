"""Continued pretraining, against the dense model."""
