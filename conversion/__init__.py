"""Dense checkpoint in, NSA checkpoint out: plan it, convert it, verify it, and back."""

# Some functions have the names of their modules. Since they are imported here, `nsa_hf.conversion.convert` and its like
# are the functions, whichever module is imported first.
from .convert import convert
from .export import export_dense, render_export
from .measure import Measuring
from .merge import merge
from .plan import plan, render_plan
from .timing import Timing
from .verify import render_verify, verify

__all__ = [
    "Measuring",
    "Timing",
    "convert",
    "export_dense",
    "merge",
    "plan",
    "render_export",
    "render_plan",
    "render_verify",
    "verify",
]
