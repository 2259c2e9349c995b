"""Dense checkpoint in, NSA checkpoint out: plan it, convert it, verify it, and back."""

# The functions have the names of their modules: imported here, at once, the functions are what
# `nsa_hf.conversion.convert` and its like mean, whoever imports which module first.
from .convert import convert
from .export import export_dense, render_export
from .plan import plan, render_plan
from .verify import render_verify, verify

__all__ = ["convert", "export_dense", "plan", "render_export", "render_plan", "render_verify", "verify"]
