"""What `nsa_attention` refuses: each wrong argument raises an error that names it (on CPU tensors, values too)."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from attention_inputs import Inputs, Shape, make_inputs

from nsa_hf.kernels import nsa_attention

PLAIN = Shape(batch=2)  # l 4, d 2, l' 4, topk 4, init 1, local 2, window 5; 30 tokens, 14 blocks, 4 heads on 2
ONE_ROW = Shape()
LAST = Shape(queries=6)
INDEX = Shape(index=(2, 0, 3))  # with the compressed branch
EIGHT_BITS = Shape(index=(2, 0, 3), eight_bits=True, compressed=False)
Change = Callable[[Inputs], dict[str, Any]]


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def cut(name: str, dim: int, length: int) -> Change:
    return lambda inputs: {name: inputs[name].narrow(dim, 0, length)}


def to(name: str, dtype: torch.dtype) -> Change:
    return lambda inputs: {name: inputs[name].to(dtype)}


def windows(length: int, **more: Any) -> Change:
    return lambda inputs: {"k_win": inputs["k"][:, -length:], "v_win": inputs["v"][:, -length:], **more}


def give(**changes: Any) -> Change:
    return lambda inputs: changes


# what is wrong -> the layout it is wrong in, the change, the error, what its message must say
REFUSED: dict[str, tuple[Shape, Change, type[Exception], str]] = {
    # sizes
    "stride does not divide kernel": (PLAIN, give(kernel_stride=3), ValueError, r"kernel_stride.*kernel_size.*3.*4"),
    "stride does not divide block": (
        PLAIN,
        give(kernel_size=6, kernel_stride=3, block_size=8),
        ValueError,
        r"kernel_stride.*block_size.*3.*8",
    ),
    "block shorter than kernel": (
        PLAIN,
        give(kernel_size=8, block_size=4),
        ValueError,
        r"kernel_size.*block_size.*8.*4",
    ),
    "fewer blocks than forced": (PLAIN, give(topk=2), ValueError, r"topk.*init_blocks.*local_blocks.*3.*2"),
    "no local block": (PLAIN, give(local_blocks=0), ValueError, r"local_blocks.*1.*0"),
    "negative init blocks": (PLAIN, give(init_blocks=-1), ValueError, r"init_blocks.*0.*-1"),
    "no window": (PLAIN, give(window_size=0), ValueError, r"window_size.*1.*0"),
    "no stride": (PLAIN, give(kernel_stride=0), ValueError, r"kernel_stride.*1.*0"),
    "no kernel": (PLAIN, give(kernel_size=0), ValueError, r"kernel_size.*1.*0"),
    "size is a float": (PLAIN, give(topk=4.0), TypeError, r"topk.*int.*4\.0"),
    "size is a bool": (PLAIN, give(init_blocks=True), TypeError, r"init_blocks.*int.*True"),
    "size is None": (PLAIN, give(window_size=None), TypeError, r"window_size.*int.*None"),
    "size is NumPy's": (PLAIN, give(topk=np.int64(4)), TypeError, r"topk.*int.*int64\(4\)"),
    "size beyond every position": (PLAIN, give(topk=2**70), ValueError, rf"topk.*{2**31 - 1}.*{2**70}"),
    "window beyond every position": (PLAIN, give(window_size=2**31), ValueError, r"window_size.*2147483648"),
    # tensors
    **{
        f"{name} is {what}": (PLAIN, give(**{name: x}), TypeError, rf"\b{name} must be a tensor, got {what}")
        for name in ("q", "k", "v", "k_cmp", "v_cmp", "gates")
        for what, x in (("NoneType", None), ("list", [1.0]))
    },
    "k_win is a list": (PLAIN, lambda x: {"k_win": [1.0], "v_win": x["v"]}, TypeError, r"k_win.*tensor.*list"),
    "starts are a list": (PLAIN, give(starts=[0, 3]), TypeError, r"starts.*tensor.*list"),
    "lengths are a number": (PLAIN, give(lengths=30), TypeError, r"lengths.*tensor.*int"),
    "cu_seqlens are a tuple": (ONE_ROW, give(cu_seqlens=(0, 30)), TypeError, r"cu_seqlens.*tensor.*tuple"),
    "k is sparse": (PLAIN, lambda x: {"k": x["k"].to_sparse()}, TypeError, r"\bk\b.*strided.*sparse_coo"),
    **{
        f"{name} on another device": (
            LAST if name == "lengths" else ONE_ROW,
            lambda x, name=name: {name: x.get(name, ints(0, 30) if name == "cu_seqlens" else ints(3)).to("meta")},
            ValueError,
            rf"\b{name}\b.*device.*cpu.*meta",
        )
        for name in ("k", "v", "k_cmp", "v_cmp", "gates", "starts", "lengths", "cu_seqlens")
    },
    "no query heads": (
        PLAIN,
        lambda x: {"q": x["q"][:, :, :0], "gates": x["gates"][:, :, :0]},
        ValueError,
        r"\bq\b.*head.*30, 0, 4",
    ),
    "no KV heads": (PLAIN, lambda x: {"k": x["k"][:, :, :0], "v": x["v"][:, :, :0]}, ValueError, r"\bk\b.*30, 0, 4"),
    "no numbers in a key": (
        PLAIN,
        lambda x: {name: x[name][..., :0] for name in ("q", "k", "k_cmp")},
        ValueError,
        r"\bq\b.*number.*30, 4, 0",
    ),
    "no numbers in a value": (
        PLAIN,
        lambda x: {name: x[name][..., :0] for name in ("v", "v_cmp")},
        ValueError,
        r"\bv\b.*number.*30, 2, 0",
    ),
    # scale
    **{
        f"scale is {scale!r}": (
            PLAIN,
            give(scale=scale),
            ValueError,
            rf"scale.*positive.*finite.*{re.escape(str(scale))}",
        )
        for scale in (float("nan"), float("inf"), 0, 0.0, -0.5, 1e39, 10**400)
    },
    **{
        f"scale is {scale!r}": (PLAIN, give(scale=scale), TypeError, r"scale.*number.*None.*got")
        for scale in ("0.5", True, torch.tensor(0.5), [0.5], 1j)
    },
    # queries, keys, values, gates
    "q has three dimensions": (PLAIN, lambda x: {"q": x["q"][0]}, ValueError, r"\bq\b.*30, 4, 4"),
    "more queries than keys": (
        PLAIN,
        lambda x: {"k": x["k"][:, :20], "v": x["v"][:, :20]},
        ValueError,
        r"\bT\b.*\bS\b.*30.*20",
    ),
    "heads do not divide": (
        PLAIN,
        lambda x: {"q": x["q"][:, :, :3], "gates": x["gates"][:, :, :3]},
        ValueError,
        r"Hq.*3.*2",
    ),
    "k of another width": (PLAIN, cut("k", 3, 3), ValueError, r"\bk\b.*Dk"),
    "k of another batch": (PLAIN, cut("k", 0, 1), ValueError, r"\bk\b.*B\b"),
    "v shorter than k": (PLAIN, cut("v", 1, 29), ValueError, r"\bv\b.*30.*29"),
    "v of fewer heads": (PLAIN, cut("v", 2, 1), ValueError, r"\bv\b"),
    "two gates": (PLAIN, cut("gates", 3, 2), ValueError, r"gates.*3.*2"),
    "gates of fewer queries": (PLAIN, cut("gates", 1, 29), ValueError, r"gates.*30.*29"),
    "gates of fewer heads": (PLAIN, cut("gates", 2, 2), ValueError, r"gates"),
    "gates of three dimensions": (PLAIN, lambda x: {"gates": x["gates"][..., 0]}, ValueError, r"gates"),
    # dtypes
    "q of integers": (PLAIN, to("q", torch.int64), TypeError, r"\bq\b.*int64"),
    "k of another dtype": (PLAIN, to("k", torch.float32), TypeError, r"\bk\b.*float64.*float32"),
    "v of another dtype": (PLAIN, to("v", torch.bfloat16), TypeError, r"\bv\b.*float64.*bfloat16"),
    "k_cmp of another dtype": (PLAIN, to("k_cmp", torch.float32), TypeError, r"k_cmp.*float64.*float32"),
    "v_cmp of another dtype": (PLAIN, to("v_cmp", torch.float32), TypeError, r"v_cmp.*float64.*float32"),
    "gates of another dtype": (PLAIN, to("gates", torch.float16), TypeError, r"gates.*float16"),
    "k_win of another dtype": (
        PLAIN,
        lambda x: {"k_win": x["k"].float(), "v_win": x["v"]},
        TypeError,
        r"k_win.*float64.*float32",
    ),
    # an index
    "an index's queries alone": (INDEX, give(k_index=None), ValueError, r"q_index and k_index go together"),
    "an index's keys alone": (INDEX, give(q_index=None), ValueError, r"q_index and k_index go together"),
    "scales alone": (PLAIN, give(k_index_scales=torch.ones(2, 30, 2)), ValueError, r"q_index and k_index go together"),
    "q_index of another dtype": (INDEX, to("q_index", torch.float32), TypeError, r"q_index.*float64.*float32"),
    "k_index of another dtype": (INDEX, to("k_index", torch.float32), TypeError, r"k_index.*float64.*float32"),
    "q_index of fewer queries": (INDEX, cut("q_index", 1, 29), ValueError, r"q_index.*\[1, 30\].*1, 29"),
    "k_index of fewer keys": (INDEX, cut("k_index", 1, 29), ValueError, r"k_index.*\[1, 30\].*1, 29"),
    "q_index of fewer channels": (INDEX, cut("q_index", 3, 2), ValueError, r"as many channels.*2 and 3"),
    "an index without channels": (
        INDEX,
        lambda x: {name: x[name][..., :0] for name in ("q_index", "k_index")},
        ValueError,
        r"q_index.*1 \.\. 256",
    ),
    "q_index heads do not divide": (INDEX, cut("q_index", 2, 3), ValueError, r"q_index.*multiple.*2 KV heads.*3"),
    "k_index of three heads": (
        INDEX,
        lambda x: {"k_index": x["q_index"][:, :, :3]},
        ValueError,
        r"k_index.*2 KV heads, or one.*3",
    ),
    "no compressed keys and no index": (PLAIN, give(k_cmp=None, v_cmp=None), ValueError, r"k_cmp.*index"),
    "int8 keys without scales": (EIGHT_BITS, give(k_index_scales=None), ValueError, r"int8.*k_index_scales"),
    "scales of keys in 64 bits": (
        INDEX,
        give(k_index_scales=torch.ones(1, 30, 2, dtype=torch.bfloat16)),
        TypeError,
        r"k_index_scales.*int8.*float64",
    ),
    "scales in float32": (EIGHT_BITS, to("k_index_scales", torch.float32), TypeError, r"bfloat16.*float32"),
    "scales of fewer keys": (EIGHT_BITS, cut("k_index_scales", 1, 29), ValueError, r"1, 30, 2.*1, 29, 2"),
    **{
        f"index_scale is {scale!r}": (INDEX, give(index_scale=scale), ValueError, r"index_scale.*positive.*finite")
        for scale in (0.0, -1.0, float("nan"))
    },
    # compressed blocks
    "a block too few": (
        PLAIN,
        lambda x: {"k_cmp": x["k_cmp"][:, 1:], "v_cmp": x["v_cmp"][:, 1:]},
        ValueError,
        r"k_cmp.*14.*13",
    ),
    "a block too many": (
        LAST,
        lambda x: {"k_cmp": x["k"][:, :15], "v_cmp": x["v"][:, :15]},
        ValueError,
        r"k_cmp.*14.*15",
    ),
    "fewer value blocks": (PLAIN, cut("v_cmp", 1, 13), ValueError, r"v_cmp.*14.*13"),
    "k_cmp of fewer heads": (PLAIN, cut("k_cmp", 2, 1), ValueError, r"k_cmp"),
    "v_cmp of another width": (PLAIN, cut("v_cmp", 3, 3), ValueError, r"v_cmp"),
    "a block too few for the longest row": (
        PLAIN,
        lambda x: {
            "lengths": ints(30, 28),
            "starts": ints(3, 0),
            "k_cmp": x["k_cmp"][:, :12],
            "v_cmp": x["v_cmp"][:, :12],
        },
        ValueError,
        r"k_cmp.*13.*12",
    ),
    "blocks across documents": (ONE_ROW, give(cu_seqlens=ints(0, 13, 30)), ValueError, r"k_cmp.*12.*14"),
    # window
    "k_win alone": (PLAIN, lambda x: {"k_win": x["k"]}, ValueError, r"k_win.*v_win"),
    "v_win alone": (PLAIN, lambda x: {"v_win": x["v"]}, ValueError, r"v_win"),
    "window too short": (LAST, windows(9), ValueError, r"k_win.*10.*9"),
    "window longer than the keys": (
        LAST,
        lambda x: {"k_win": x["k"].repeat(1, 2, 1, 1), "v_win": x["v"].repeat(1, 2, 1, 1)},
        ValueError,
        r"k_win.*30.*60",
    ),
    "window not whole with lengths": (LAST, windows(29, lengths=ints(20)), ValueError, r"k_win.*30.*29"),
    "window lengths differ": (
        LAST,
        lambda x: {"k_win": x["k"], "v_win": x["v"][:, 1:]},
        ValueError,
        r"v_win.*30.*29",
    ),
    "k_win of fewer heads": (PLAIN, lambda x: {"k_win": x["k"][:, :, :1], "v_win": x["v"]}, ValueError, r"k_win"),
    # packed documents
    "cu_seqlens of int64": (ONE_ROW, give(cu_seqlens=ints(0, 30, dtype=torch.int64)), TypeError, r"cu_seqlens.*int32"),
    "cu_seqlens of two dimensions": (ONE_ROW, give(cu_seqlens=ints(0, 30)[None]), ValueError, r"cu_seqlens"),
    "cu_seqlens too short": (ONE_ROW, give(cu_seqlens=ints(0)), ValueError, r"cu_seqlens"),
    "cu_seqlens end early": (ONE_ROW, give(cu_seqlens=ints(0, 13, 29)), ValueError, r"cu_seqlens.*30.*29"),
    "cu_seqlens end late": (ONE_ROW, give(cu_seqlens=ints(0, 13, 31)), ValueError, r"cu_seqlens.*30.*31"),
    "cu_seqlens begin late": (ONE_ROW, give(cu_seqlens=ints(1, 30)), ValueError, r"cu_seqlens"),
    "cu_seqlens fall": (ONE_ROW, give(cu_seqlens=ints(0, 20, 13, 30)), ValueError, r"cu_seqlens.*rise.*20, 13"),
    "cu_seqlens of a batch": (PLAIN, give(cu_seqlens=ints(0, 30)), ValueError, r"cu_seqlens.*B.*2"),
    "cu_seqlens with fewer queries": (LAST, give(cu_seqlens=ints(0, 30)), ValueError, r"cu_seqlens.*T.*S.*6.*30"),
    "cu_seqlens with starts": (
        ONE_ROW,
        give(cu_seqlens=ints(0, 30), starts=ints(0)),
        ValueError,
        r"cu_seqlens.*starts",
    ),
    "cu_seqlens with lengths": (
        ONE_ROW,
        give(cu_seqlens=ints(0, 30), lengths=ints(30)),
        ValueError,
        r"cu_seqlens.*lengths",
    ),
    # padded rows
    "starts of int64": (PLAIN, give(starts=ints(0, 1, dtype=torch.int64)), TypeError, r"starts.*int32.*int64"),
    "starts that want a gradient": (
        PLAIN,
        give(starts=torch.zeros(2, requires_grad=True)),
        TypeError,
        r"starts.*int32.*float32",
    ),
    "starts of one row": (PLAIN, give(starts=ints(0)), ValueError, r"starts.*2.*1"),
    "starts of two dimensions": (PLAIN, give(starts=ints(0, 1)[:, None]), ValueError, r"starts"),
    "starts negative": (PLAIN, give(starts=ints(0, -1)), ValueError, r"starts.*-1"),
    "starts behind the keys": (PLAIN, give(starts=ints(0, 31)), ValueError, r"starts.*30.*31"),
    "lengths of int64": (PLAIN, give(lengths=ints(30, 9, dtype=torch.int64)), TypeError, r"lengths.*int32.*int64"),
    "lengths of three rows": (PLAIN, give(lengths=ints(1, 2, 3)), ValueError, r"lengths.*2.*3"),
    "lengths behind the keys": (PLAIN, give(lengths=ints(31, 9)), ValueError, r"lengths.*30.*31"),
    "lengths negative": (PLAIN, give(lengths=ints(30, -1)), ValueError, r"lengths.*-1"),
    # backends
    "unknown backend": (PLAIN, give(backend="cuda"), ValueError, r"backend.*cuda.*triton.*reference"),
    "no backend": (PLAIN, give(backend=None), ValueError, r"backend None.*triton.*reference"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    shape, change, error, message = REFUSED[name]
    inputs = make_inputs(shape)
    nsa_attention(**inputs)  # right until it is changed
    with pytest.raises(error, match=f"(?s){message}"):
        nsa_attention(**{**inputs, **change(inputs)})


def test_triton_needs_a_gpu() -> None:
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter, which needs no GPU, is on")
    with pytest.raises(ValueError, match=r"triton.*CUDA.*cpu.*reference"):
        nsa_attention(**make_inputs(PLAIN), backend="triton")


def test_triton_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"triton.*install.*reference"):
        nsa_attention(**make_inputs(PLAIN), backend="triton")


def test_gates_in_fp32_are_no_mismatch() -> None:
    inputs = make_inputs(PLAIN, dtype=torch.bfloat16)
    inputs["gates"] = inputs["gates"].float()
    assert nsa_attention(**inputs).dtype == torch.bfloat16


def test_an_error_leaves_the_inputs_alone() -> None:
    inputs = make_inputs(PLAIN)
    before = {name: x.clone() for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    nsa_attention(**inputs)
    with pytest.raises(ValueError, match="topk"):
        nsa_attention(**{**inputs, "topk": 1})
    assert all(torch.equal(inputs[name], x) for name, x in before.items())


def test_a_scale_may_be_any_int_that_is_finite_in_float32() -> None:
    inputs = make_inputs(PLAIN)
    as_int, as_float = (nsa_attention(**{**inputs, "scale": scale}) for scale in (2**70, 2.0**70))
    assert torch.equal(as_int, as_float)
