"""The static cache: buffers that stay where they are, one graph for all steps, the same tokens as one pass."""

from __future__ import annotations

import pytest
import torch
from generation_steps import BORDERS, GREEDY, LENGTH, check_dense_prefill, in_steps, left_padded, relative, tokens
from tiny_families import VOCABULARY, tiny_dense
from tiny_models import SELECTORS, TINY_SIZES, randomize_nsa
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from nsa_hf import NsaError, nsa_config_from_dense
from nsa_hf.cache.extras import COMPRESSED, INDEX, Extras
from nsa_hf.cache.static import NsaStaticLayer
from nsa_hf.entries import Compressors
from nsa_hf.families import family_of
from nsa_hf.index import Index
from nsa_hf.kernels import build_compressor, compress, n_blocks
from nsa_hf.releases import CACHE

SIZE, STRIDE, HEADS, DIM, ROOM = 8, 4, 2, 6, 57
EXTRAS = Extras((SIZE, STRIDE), Index(((1, 3), (5, 6)), 8))
BUFFERS = ("keys", "values", *COMPRESSED, *INDEX)


# With an index in 8 bits too; other tests without.
EVERY_SELECTOR = pytest.mark.parametrize("tiny_nsa_model", SELECTORS, indirect=True)


@pytest.fixture(params=["compressed", "channels"])
def tiny_nsa_model(tiny_nsa_model, request):
    """As the fixture of this name, for both ways of choosing blocks."""
    return lambda **fields: tiny_nsa_model(**{**SELECTORS[request.param], **fields})


@pytest.fixture
def compressors():
    torch.manual_seed(0)
    parts = [build_compressor("mlp", SIZE, DIM, 5) for _ in range(2)]
    for compressor in parts:
        torch.nn.init.normal_(compressor.down.weight)
    return Compressors(*(compressor.requires_grad_(False) for compressor in parts), STRIDE)


def filled(layer: NsaStaticLayer, compressors, steps, starts=None, batch: int = 2) -> NsaStaticLayer:
    for step in steps:
        keys = layer.update(torch.randn(batch, HEADS, step, DIM), torch.randn(batch, HEADS, step, DIM))
        layer.extend(*keys, compressors, starts)
        layer.extend_index(keys[0], layer.index)
    return layer


def assert_as_of_one_pass(layer: NsaStaticLayer, compressors, starts=None) -> None:
    length = int(layer.get_seq_length())
    pairs = ((layer.keys, layer.compressed_keys), (layer.values, layer.compressed_values))
    for (states, entries), compressor in zip(pairs, compressors[:2], strict=True):
        bounds = None if starts is None else starts.clamp(max=length)
        expected = compress(states[:, :, :length].transpose(1, 2), compressor, STRIDE, starts=bounds)
        for row in range(states.shape[0]):
            complete = n_blocks(length - (0 if starts is None else int(starts[row])), SIZE, STRIDE)
            torch.testing.assert_close(entries[row, :complete], expected[row, :complete])
    for name, expected in zip(INDEX, layer.index.keys(layer.keys[:, :, :length]), strict=True):
        got = getattr(layer, name)
        assert got is expected is None or torch.equal(got[:, :, :length], expected)


def addresses(*layers) -> list[tuple[str, int, torch.Size]]:
    held = [(name, getattr(layer, name)) for layer in layers for name in BUFFERS]
    return [(name, buffer.data_ptr(), buffer.shape) for name, buffer in held if buffer is not None]


def poison(cache) -> None:
    """What stands behind the tokens held may be anything."""
    for layer in cache.layers:
        length = int(layer.get_seq_length())
        done = n_blocks(length, SIZE, STRIDE)
        for name in BUFFERS:
            if (buffer := getattr(layer, name)) is not None:
                behind = buffer[:, done:] if name in COMPRESSED else buffer[:, :, length:]
                behind.fill_(float("nan") if buffer.is_floating_point() else 127)


@pytest.mark.parametrize("steps", [[50], [1] * 57, [7, 1, 1, 8, 3, 30], [8, 4, 4, 34], [56, 1], [3]])
@pytest.mark.parametrize("starts", [None, [0, 3, 50, 21]])
def test_extended_by_any_steps_equals_one_pass(steps, starts, compressors):
    torch.manual_seed(1)
    starts = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    layer = filled(NsaStaticLayer(ROOM, EXTRAS), compressors, steps, starts, batch=4)
    assert layer.compressed_keys.shape == (4, n_blocks(ROOM, SIZE, STRIDE), HEADS, DIM)
    assert layer.index_keys.shape == (4, HEADS, ROOM, 3) and layer.index_keys.dtype == torch.int8
    assert layer.index_scales.shape == (4, HEADS, ROOM) and layer.index_scales.dtype == torch.bfloat16
    assert_as_of_one_pass(layer, compressors, starts)


def test_a_step_compresses_only_what_it_may_complete(compressors):
    layer, places = NsaStaticLayer(ROOM, EXTRAS), []
    compressors.keys.register_forward_hook(lambda module, args, output: places.append(args[0].shape[1]))
    filled(layer, compressors, [20, 1, 5, 1])
    assert places == [5, 1, 2, 1]


def test_a_cache_without_room_for_a_block_has_no_entries(compressors):
    layer = filled(NsaStaticLayer(SIZE - 1, EXTRAS), compressors, [SIZE - 1])
    assert layer.compressed_keys.shape[1] == 0


@pytest.mark.parametrize("removed", [0, 1, 5, 17, 41])
@pytest.mark.parametrize("bits", [16, 8])
def test_cropped_and_filled_again(bits, removed, compressors):
    torch.manual_seed(1)
    layer = filled(NsaStaticLayer(ROOM, Extras((SIZE, STRIDE), Index(((0, 2),), bits))), compressors, [41])
    layer.crop(-removed)
    assert int(layer.get_seq_length()) == 41 - removed
    filled(layer, compressors, [1, 5, removed + 3])
    assert_as_of_one_pass(layer, compressors)
    with pytest.raises(NsaError, match="negative number of tokens to remove, got 3"):
        layer.crop(3)


def test_reordered_and_reset_in_place(compressors):
    torch.manual_seed(1)
    layer = filled(NsaStaticLayer(ROOM, EXTRAS), compressors, [30], batch=3)
    before, where = {name: getattr(layer, name).clone() for name in BUFFERS}, addresses(layer)
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert all(torch.equal(getattr(layer, name), states[[2, 0, 0]]) for name, states in before.items())
    filled(layer, compressors, [9], batch=3)
    assert_as_of_one_pass(layer, compressors)
    layer.reset()
    filled(layer, compressors, [12], batch=3)
    assert_as_of_one_pass(layer, compressors)
    assert addresses(layer) == where


def test_more_tokens_than_there_is_room_for_are_refused(compressors):
    with pytest.raises(NsaError, match="room for 57 tokens, holds 50 and was given 8 more: make it with a larger"):
        filled(NsaStaticLayer(ROOM, EXTRAS), compressors, [50, 8])


@EVERY_SELECTOR
def test_a_plain_layer_is_adopted_with_what_it_holds(tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens()
    cache = StaticCache(model.config, max_cache_len=170)
    expected = StaticCache(model.config, max_cache_len=170)
    with torch.no_grad():
        model(x[:, :100], **{CACHE: expected})
        for index, layer in enumerate(expected.layers):
            cache.layers[index].update(layer.keys[:, :, :100], layer.values[:, :, :100])
        assert all(not isinstance(layer, NsaStaticLayer) for layer in cache.layers)
        got = [model(x[:, 100:107], **{CACHE: c}).logits for c in (cache, expected)]
    assert all(isinstance(layer, NsaStaticLayer) for layer in cache.layers)
    torch.testing.assert_close(*got)


@pytest.mark.parametrize("prefill", BORDERS)
def test_prefill_to_every_border_then_token_by_token(prefill, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens()
    cache = StaticCache(model.config, max_cache_len=97)
    with torch.no_grad():
        first = in_steps(model, x, [prefill], cache)
        where = addresses(*cache.layers)
        poison(cache)
        rest = in_steps(model, x[:, prefill:], [1] * 20, cache)
        stepped = torch.cat([first, rest], dim=1)
        assert relative(stepped, model(x[:, : prefill + 20]).logits) < 1e-5
    assert addresses(*cache.layers) == where


@EVERY_SELECTOR
@pytest.mark.parametrize("fields", [{"nsa_dense_layers": [1]}, {"nsa_compression": "mean", "nsa_gate": "sigmoid"}])
@pytest.mark.parametrize("chunk", [3, 16, 40])
def test_chunked_prefill(chunk, fields, tiny_nsa_model):
    model, x = tiny_nsa_model(**fields), tokens(1)
    steps = [chunk] * (LENGTH // chunk)
    with torch.no_grad():
        stepped = in_steps(model, x, steps, StaticCache(model.config, max_cache_len=LENGTH))
        assert relative(stepped, model(x[:, : sum(steps)]).logits) < 1e-5


@EVERY_SELECTOR
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("fixed_mask", [False, True])
def test_left_padded_rows(dense, fixed_mask, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(3)
    starts = [0, 37, 90]
    inputs = left_padded(x, starts)
    cache = StaticCache(model.config, max_cache_len=LENGTH)
    if fixed_mask:
        inputs["attention_mask"] = FixedShape(inputs["attention_mask"])
    with torch.no_grad(), model.dense_attention() if dense else torch.no_grad():
        stepped = in_steps(model, x, [41, 1, 7] + [1] * 101, cache, **inputs)
        for row, start in enumerate(starts):
            assert relative(stepped[row, start:], model(x[row : row + 1, start:]).logits[0]) < 1e-5


class FixedShape:
    """A mask whose every beginning has the shape of the whole, as `generate` gives it with a static cache."""

    def __init__(self, mask):
        self.mask = mask

    def __getitem__(self, index):
        mask = self.mask.clone()
        mask[:, index[1].stop :] = 0
        return mask


@pytest.mark.parametrize(
    "model_type, selector",
    [
        *((family, "compressed") for family in ("qwen3", "olmo2", "phi3", "gpt_neox", "mixtral", "cohere2", "jetmoe")),
        *((family, "channels-8") for family in ("qwen3", "gpt_neox", "jetmoe")),
    ],
)
def test_other_families(model_type, selector):
    dense, x = tiny_dense(model_type), tokens() % VOCABULARY
    config = nsa_config_from_dense(dense.config, **{**TINY_SIZES, **SELECTORS[selector]})
    model = family_of(config).causal_lm_class(config).eval()
    model.load_state_dict(dense.state_dict(), strict=False)
    randomize_nsa(model)
    inputs = left_padded(x, [0, 31])
    with torch.no_grad():
        stepped = in_steps(model, x, [20, 50, *[1] * 40], StaticCache(config, max_cache_len=LENGTH), **inputs)
        assert relative(stepped[0], model(x[:1, :110]).logits[0]) < 1e-5
        assert relative(stepped[1, 31:], model(x[1:, 31:110]).logits[0]) < 1e-5


@EVERY_SELECTOR
def test_a_dense_prefill_can_be_continued_sparse(tiny_nsa_model):
    model = tiny_nsa_model()
    check_dense_prefill(model, (StaticCache(model.config, max_cache_len=LENGTH) for _ in range(2)), BUFFERS)


@pytest.mark.parametrize(
    "tiny_nsa_model, padded",
    [("compressed", False), ("compressed", True), ("channels", False), ("channels-8", True)],
    indirect=["tiny_nsa_model"],
)
def test_the_decoding_step_is_one_graph_for_all_steps(padded, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens()
    starts = [0, 37] if padded else [0, 0]
    inputs = left_padded(x, starts)
    mask = inputs.pop("attention_mask")
    cache = StaticCache(model.config, max_cache_len=LENGTH)
    torch._dynamo.reset()
    counters.clear()
    # fullgraph: a graph break, which reading a value off the device would be, raises
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        logits = [model(x[:, :90], mask[:, :90], **{CACHE: cache}, position_ids=inputs["position_ids"][:, :90])]
        where = addresses(*cache.layers)
        for place in range(90, 140):
            padding = {"attention_mask": FixedShape(mask)[:, : place + 1]} if padded else {}
            now = inputs["position_ids"][:, place : place + 1]
            logits.append(step(x[:, place : place + 1], position_ids=now, **{CACHE: cache}, **padding))
        stepped = torch.cat([out.logits for out in logits], dim=1)
        for row, start in enumerate(starts):
            assert relative(stepped[row, start:], model(x[row : row + 1, start:140]).logits[0]) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1 and addresses(*cache.layers) == where


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "top_k": 5, "num_return_sequences": 3}, {"num_beams": 3}, {"prefill_chunk_size": 7}],
)
@pytest.mark.parametrize("padded", [False, True])
def test_generate_gives_the_tokens_of_the_dynamic_cache(options, padded, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(2, 70)
    mask = left_padded(x, [0, 29])["attention_mask"] if padded else torch.ones_like(x)
    out = []
    for kind in ("static", None):
        torch.manual_seed(0)
        generation = {**GREEDY, "max_new_tokens": 16, "cache_implementation": kind, **options}
        out.append(model.generate(x, attention_mask=mask, **generation))
    assert torch.equal(out[0], out[1])


def test_generate_compiles_one_graph(tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(2, 70)
    mask = left_padded(x, [0, 29])["attention_mask"]
    compiled = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    out = model.generate(
        x, attention_mask=mask, cache_implementation="static", compile_config=compiled, max_new_tokens=20, **GREEDY
    )
    assert torch.equal(out, model.generate(x, attention_mask=mask, max_new_tokens=20, **GREEDY))
    assert counters["stats"]["unique_graphs"] == 1


@EVERY_SELECTOR
def test_a_conversation_continues_from_its_static_cache(tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(1, 80)
    cache = StaticCache(model.config, max_cache_len=120)
    first = model.generate(x, attention_mask=torch.ones_like(x), **{CACHE: cache}, max_new_tokens=10, **GREEDY)
    turn = torch.cat([first, tokens(1, 12)], dim=1)
    mask = torch.ones_like(turn)
    second = model.generate(turn, attention_mask=mask, **{CACHE: cache}, max_new_tokens=10, **GREEDY)
    assert torch.equal(second, model.generate(turn, attention_mask=mask, max_new_tokens=10, **GREEDY))


def test_packed_documents_and_wrong_masks_are_refused(tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(1, 20)

    def pass_with(**inputs):
        with torch.no_grad():
            model(x, **{CACHE: StaticCache(model.config, max_cache_len=30)}, **inputs)

    with pytest.raises(NsaError, match="static cache cannot hold packed documents"):
        pass_with(position_ids=torch.arange(20)[None] % 10)
    with pytest.raises(NsaError, match="static cache cannot hold packed documents"):
        pass_with(cu_seq_lens_q=torch.tensor([0, 10, 20], dtype=torch.int32))
    with pytest.raises(NsaError, match=r"attention_mask must be \[1, 20\] or \[1, 30\] .* got \[1, 25\]"):
        pass_with(attention_mask=torch.ones(1, 25))
    holes = torch.ones(1, 20)
    holes[0, 5] = 0
    with pytest.raises(NsaError, match="attention_mask has holes"):
        pass_with(attention_mask=holes)


@pytest.mark.parametrize("width", [80, 90])
def test_rows_that_end_with_padding_may_not_be_continued(width, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(2, 80)
    mask = torch.ones(2, width)
    mask[0, 65:] = mask[:, 80:] = 0
    cache = StaticCache(model.config, max_cache_len=90)
    with torch.no_grad():
        logits = model(x, **{CACHE: cache}, attention_mask=mask).logits
        assert relative(logits[0, :65], model(x[:1, :65]).logits[0]) < 1e-5 and logits.isfinite().all()
        mask = torch.cat([mask[:, :80], torch.ones(2, 1)], dim=1)
        with pytest.raises(NsaError, match="attention_mask has holes"):
            model(x[:, :1], **{CACHE: cache}, attention_mask=mask)


@pytest.mark.parametrize("tiny_nsa_model", ["compressed"], indirect=True)
@pytest.mark.parametrize("hole", [5, 19])
def test_a_compiled_step_stops_at_a_mask_with_holes(hole, tiny_nsa_model):
    """It cannot look at the mask before, as a step on a GPU cannot without waiting."""
    model, x = tiny_nsa_model(), tokens(2, 21)
    step = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    cache = StaticCache(model.config, max_cache_len=30)
    mask = torch.zeros(2, 30)
    mask[:, :21], mask[1, :2] = 1, 0
    with torch.no_grad():
        model(x[:, :20], **{CACHE: cache}, attention_mask=mask[:, :20])
        step(x[:, 20:], **{CACHE: cache}, attention_mask=mask)
        mask[1, hole] = 0
        with pytest.raises(RuntimeError, match="attention_mask has holes"):
            step(x[:, 20:], **{CACHE: cache}, attention_mask=mask)
    torch._dynamo.reset()
