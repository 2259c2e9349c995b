"""What `help()` says first of a family's sparse classes: in a screen, what is sparse about them."""

from __future__ import annotations

import textwrap

from .fields import FOUND_FIELDS, NSA_FIELDS

CAUSAL_LM = """`{dense}` with Native Sparse Attention: the same parameters and methods, and these.

    >>> model = nsa_hf.from_dense("path/to/{folder}", topk=16)

What is sparse: in layers with full attention each query reads `nsa_topk` blocks of `nsa_block_size` tokens: the first,
the nearest and those that matter most to it; and, each times a gate, the last `nsa_window_size` tokens and the
compressed past. Layers with a sliding window or a state, and `nsa_dense_layers`, stay as they are. Up to
`config.nsa_exact_tokens` tokens a converted model is the dense one. What is new is under `nsa` in each attention. The
sizes: `help(nsa_hf.{config})`.

    from_dense(model_or_path)    a dense model, in memory or in a folder, converted in memory
    dense_attention()            `with model.dense_attention():` runs the same weights dense
    record_selection()           `with model.record_selection() as blocks:` says which blocks each layer selects
    record_attention()           the same with what each attention was given
    set_gate_blend(share)        with `nsa_gate="blend"`: from dense (0) to the paper's gates (1)

Masks are 2D, of padding; packed rows are known by `position_ids` or `cu_seq_lens_q`. `attn_implementation` is "nsa",
the kernels on a GPU and the reference elsewhere, or "eager", the reference everywhere.
"""

MODEL = "`{dense}` with Native Sparse Attention, the decoder without a head: see `help(nsa_hf.{causal_lm})`."

CONFIG = """`{dense}` with the `nsa_*` fields.

    >>> config = nsa_hf.nsa_config_from_dense(AutoConfig.from_pretrained("path/to/{folder}"), topk=16)

{fields}

A config that names no selector has the paper's; `nsa_config_from_dense`, `from_dense` and `convert` choose it as
`nsa-hf plan` recommends.
"""


def described_fields() -> str:
    """The fields that a user chooses: of each its name, meaning and default."""
    fields = {name: member for name, member in NSA_FIELDS.items() if name not in FOUND_FIELDS}
    wide = max(map(len, fields))
    return "\n".join(
        textwrap.fill(
            f"{name:<{wide}}  {field.metadata['help']} ({field.default})",
            width=115,
            initial_indent="    ",
            subsequent_indent=" " * (wide + 6),
        )
        for name, field in fields.items()
    )
