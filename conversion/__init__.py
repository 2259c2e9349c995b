"""Dense checkpoint in, NSA checkpoint out: plan it, convert it, verify it."""

# The functions have the names of their modules: imported here, at once, the functions are what
# `nsa_hf.conversion.convert` and its like mean, whoever imports which module first.
from .convert import convert
from .plan import plan, render_plan
from .verify import render_verify, verify

__all__ = ["convert", "plan", "render_plan", "render_verify", "verify"]
