"""Measuring a model: `nsa-hf eval OUT`, by suites, the sparse model beside the same weights run dense."""
