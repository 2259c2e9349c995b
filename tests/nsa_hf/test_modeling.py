"""A sparse Llama beside its dense one: the same up to the exact range, sparse beyond, trainable, saved and loaded."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from generation_steps import BORDERS
from tiny_models import TINY_SIZES, randomize_nsa, tiny_dense_model
from transformers import AutoModel, AutoModelForCausalLM, DataCollatorWithFlattening
from transformers.distributed import DistributedConfig

import nsa_hf
from nsa_hf import NsaError, NsaLlamaForCausalLM, NsaLlamaModel
from nsa_hf.conversion import export_dense

EXACT = TINY_SIZES["nsa_topk"] * TINY_SIZES["nsa_block_size"]


def tokens(batch: int = 2, length: int = 150, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gate", ["residual", "blend"])
@pytest.mark.parametrize("compression", ["mean", "linear", "mlp"])
def test_converted_is_dense_in_the_exact_range_and_sparse_beyond(gate, compression, tiny_nsa_model):
    model, dense, x = tiny_nsa_model(False, nsa_gate=gate, nsa_compression=compression), tiny_dense_model(), tokens()
    with torch.no_grad():
        sparse_logits, dense_logits = model(x).logits, dense(x).logits
    torch.testing.assert_close(sparse_logits[:, :EXACT], dense_logits[:, :EXACT], atol=1e-5, rtol=0)
    assert torch.equal(sparse_logits[:, :EXACT].argmax(-1), dense_logits[:, :EXACT].argmax(-1))
    assert (sparse_logits - dense_logits)[:, EXACT + 16 :].abs().max() > 1e-2, "nothing is sparse"


@pytest.mark.parametrize("topk", [10, 20_000_000])
def test_a_topk_that_covers_everything_is_dense_at_any_length(topk, tiny_nsa_model):
    model, dense, x = tiny_nsa_model(False, nsa_topk=topk), tiny_dense_model(), tokens()
    with torch.no_grad(), model.record_selection() as selection:
        torch.testing.assert_close(model(x).logits, dense(x).logits, atol=1e-5, rtol=0)
        assert len(selection) == 3 and all(blocks.shape[-1] <= 64 for blocks in selection.values())
        model(x, output_attentions=True)
        assert all(blocks.shape[-1] <= 64 for blocks in selection.values())
        generated = model.generate(x, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, dense.generate(x, max_new_tokens=3, do_sample=False))


def test_the_papers_sigmoid_is_not_exact(tiny_nsa_model):
    model, dense, x = tiny_nsa_model(False, nsa_gate="sigmoid"), tiny_dense_model(), tokens(1, 40)
    with torch.no_grad():
        assert (model(x).logits - dense(x).logits).abs().max() > 1e-2


def test_dense_attention_runs_the_same_weights_dense(tiny_nsa_model):
    model, dense, x = tiny_nsa_model(), tiny_dense_model(), tokens()
    mask = torch.ones_like(x)
    mask[1, :37] = 0
    with torch.no_grad():
        sparse = model(x).logits
        with model.dense_attention():
            torch.testing.assert_close(model(x).logits, dense(x).logits)
            padded = model(x, attention_mask=mask).logits
            with model.dense_attention():
                pass
            torch.testing.assert_close(model(x).logits, dense(x).logits)
        assert torch.equal(model(x).logits, sparse), "the model is sparse again after the block"
        torch.testing.assert_close(padded[1, 37:], dense(x, attention_mask=mask).logits[1, 37:])
    with pytest.raises(RuntimeError), model.dense_attention():
        raise RuntimeError
    assert not any(contexts.dense for contexts in model.open_contexts())


def test_dense_layers_stay_dense(tiny_nsa_model):
    model, dense, x = tiny_nsa_model(nsa_dense_layers=[0, 1, -1]), tiny_dense_model(), tokens()
    assert not any(".nsa." in name for name in model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, dense(x).logits)
    names = tiny_nsa_model(nsa_dense_layers=[1]).state_dict()
    assert {name.split(".")[2] for name in names if ".nsa." in name} == {"0", "2"}


@pytest.mark.parametrize("padding", [37, 64, 149])
def test_left_padding_changes_nothing(padding, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens()
    mask = torch.ones_like(x)
    mask[1, :padding] = 0
    with torch.no_grad():
        padded = model(x, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        torch.testing.assert_close(padded[1, padding:], model(x[1:, padding:]).logits[0])
        torch.testing.assert_close(padded[0], model(x[:1]).logits[0])
    assert padded.isfinite().all()


def test_right_padding_changes_nothing(tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens()
    mask = torch.ones_like(x)
    mask[1, 90:] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(x, attention_mask=mask).logits[1, :90], model(x[1:, :90]).logits[0])


@pytest.mark.parametrize("lengths", [(70, 5, 90), (*BORDERS, 1, 1), BORDERS[::-1]], ids=["few", "borders", "falling"])
@pytest.mark.parametrize("flash_kwargs", [False, True])
def test_packed_documents_do_not_see_each_other(flash_kwargs, lengths, tiny_nsa_model):
    model = tiny_nsa_model()
    documents = [tokens(1, length, seed)[0] for seed, length in enumerate(lengths)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=flash_kwargs)
    packed = collate([{"input_ids": document.tolist()} for document in documents])
    packed.pop("labels")
    with torch.no_grad():
        together = model(**packed).logits[0]
        alone = torch.cat([model(document[None]).logits[0] for document in documents])
        torch.testing.assert_close(together, alone)
        with model.dense_attention():
            together, alone = model(**packed).logits[0], [model(document[None]).logits[0] for document in documents]
            torch.testing.assert_close(together, torch.cat(alone))


def test_causality(tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(1)
    changed = x.clone()
    changed[0, 100] = 3 + (x[0, 100] - 2) % 253
    with torch.no_grad():
        before, after = model(x).logits, model(changed).logits
    assert torch.equal(before[:, :100], after[:, :100]) and not torch.equal(before[:, 100:], after[:, 100:])


def test_all_gates_train_from_the_first_step_and_compressors_from_the_second(tiny_nsa_model):
    model, x = tiny_nsa_model(False).train(), tokens()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(x, labels=x).loss.backward()
    for layer in model.attention_layers():
        # [heads, 3]
        assert (layer.nsa.gate.down.bias.grad.view(-1, 3).abs().sum(0) > 0).all()
        assert not layer.nsa.compress_v.down.weight.grad.any()
    optimizer.step()
    optimizer.zero_grad()
    model(x, labels=x).loss.backward()
    for layer in model.attention_layers():
        for parameter in (layer.nsa.compress_v.down.weight, layer.nsa.compress_k.down.weight, layer.nsa.gate.up.weight):
            assert parameter.grad.abs().sum() > 0


def test_gradient_checkpointing_gives_the_same_gradients(tiny_nsa_model):
    x, gradients = tokens(), []
    for checkpointing in (False, True):
        model = tiny_nsa_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(x, labels=x, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_attentions_are_the_selected_branchs_weights(tiny_nsa_model):
    model, x = tiny_nsa_model(nsa_dense_layers=[1]), tokens()
    with torch.no_grad(), model.record_selection() as selection:
        out = model(x, output_attentions=True)
        torch.testing.assert_close(out.logits, model(x).logits)
    weights = out.attentions[0]
    assert [one.shape for one in out.attentions] == [(2, 6, 150, 150)] * 3
    for one in out.attentions:
        torch.testing.assert_close(one.sum(-1), torch.ones(2, 6, 150))
    assert (out.attentions[1][:, :, 149] > 0).all(), "a dense layer sees everything"
    # the weights are zero outside the selected blocks, which are at most topk
    for head in range(6):
        chosen = selection[0][:, :, head // 3]
        block = torch.arange(150) // TINY_SIZES["nsa_block_size"]
        allowed = (chosen[..., None] == block).any(2)
        assert not weights[:, head][~allowed].any()


def test_recorded_selection(tiny_nsa_model):
    model, x = tiny_nsa_model(nsa_dense_layers=[2]), tokens()
    with torch.no_grad(), model.record_selection() as selection:
        model(x)
    assert set(selection) == {0, 1} and selection[0].shape == (2, 150, 2, 4) and selection[0].dtype == torch.int32
    assert not any(contexts.records for contexts in model.open_contexts())


@pytest.mark.parametrize("chosen", ["sdpa", "flash_attention_2", "flex_attention"])
def test_other_attention_is_refused_never_used(chosen, tiny_nsa_model, tmp_path):
    model = tiny_nsa_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(NsaError, match=f"'{chosen}' is not one of a sparse model's"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=chosen)
    with pytest.raises(NsaError, match=r"not one of a sparse model's: .*`with model.dense_attention\(\):`"):
        model.set_attn_implementation(chosen)
    model.config._attn_implementation = chosen
    with pytest.raises(NsaError, match="not one of a sparse model's"):
        model(tokens())


def test_serving_engines_are_told_that_they_cannot_serve_it(tiny_nsa_model, tmp_path):
    """vLLM (seen in 0.32) and SGLang (0.5.23) ask the class, and then set these implementations in its config."""
    model = tiny_nsa_model()
    with pytest.raises(NsaError, match=r"NsaLlamaForCausalLM: vLLM and SGLang cannot serve sparse models"):
        type(model).is_backend_compatible()
    for chosen in ("vllm", "vllm_mla", "sglang"):
        model.config._attn_implementation = chosen
        with pytest.raises(NsaError, match="vLLM and SGLang cannot serve sparse models"):
            AutoModel.from_config(model.config)
    assert not type(model)._supports_attention_backend


def test_eager_is_the_reference_not_the_dense_attention(tiny_nsa_model, tmp_path):
    model, x = tiny_nsa_model(), tokens()
    model.save_pretrained(tmp_path)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.equal(eager(x).logits, model(x).logits)
        eager.set_attn_implementation("nsa")
        assert torch.equal(eager(x).logits, model(x).logits)


def test_saved_and_loaded_the_same(tiny_nsa_model, tmp_path):
    model, x = tiny_nsa_model(), tokens()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is NsaLlamaForCausalLM and type(AutoModel.from_pretrained(tmp_path)) is NsaLlamaModel
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight, "weights stay tied"
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model(x).logits)
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(clone(x).logits, model(x).logits)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_saved_in_shards_with_more_or_fewer_tokens_in_its_vocabulary(tied, tmp_path):
    x = tokens().clamp(max=199)
    dense = tiny_dense_model(tie_word_embeddings=tied)
    for count in (264, 200):
        model = NsaLlamaForCausalLM.from_dense(dense, **TINY_SIZES)
        randomize_nsa(model)
        before = model(x).logits
        model.resize_token_embeddings(count)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        logits = model(x).logits
        assert logits.shape[-1] == model.config.vocab_size == count
        assert torch.equal(logits[..., :200], before[..., :200])
        model.save_pretrained(tmp_path / "nsa", max_shard_size="40KB")
        assert len(list((tmp_path / "nsa").glob("*.safetensors"))) > 2
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "nsa")(x).logits, logits)
        export_dense(tmp_path / "nsa", tmp_path / "dense", overwrite=True)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        with model.dense_attention():
            torch.testing.assert_close(exported(x).logits, model(x).logits, atol=1e-4, rtol=0)


def test_a_dense_checkpoint_loads_with_only_new_parameters_missing(tmp_path):
    dense = tiny_dense_model()
    dense.save_pretrained(tmp_path)
    config = nsa_hf.nsa_config_from_dense(dense.config, **TINY_SIZES)
    model, info = NsaLlamaForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not info["unexpected_keys"] and all(".nsa." in name for name in info["missing_keys"])
    x = tokens(1, EXACT)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, dense(x).logits, atol=1e-5, rtol=0)


def test_initial_state_is_that_of_a_new_model_and_the_same_every_time(tiny_nsa_model):
    config = tiny_nsa_model(False).config
    first, again = (dict(nsa_hf.families.initial_nsa_state(config)) for _ in range(2))
    expected = {name: value for name, value in NsaLlamaForCausalLM(config).state_dict().items() if ".nsa." in name}
    assert {name: value.shape for name, value in first.items()} == {name: v.shape for name, v in expected.items()}
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, value in expected.items():
        assert bool(value.any()) == bool(first[name].any()), f"{name} is drawn in one and zero in the other"


def test_blend_is_set_on_the_model_and_kept_in_its_config(tiny_nsa_model):
    model, x = tiny_nsa_model(nsa_gate="blend"), tokens(1)
    with torch.no_grad():
        exact = model(x).logits
        model.set_gate_blend(0.5)
        assert model.config.nsa_gate_blend == 0.5 and (model(x).logits - exact).abs().max() > 1e-3
    with pytest.raises(NsaError, match="between 0 and 1"):
        model.set_gate_blend(2.0)
    with pytest.raises(NsaError, match="needs nsa_gate='blend'"):
        tiny_nsa_model().set_gate_blend(0.5)


def test_no_split_modules_exist(tiny_nsa_model):
    model = tiny_nsa_model()
    assert set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}


@pytest.mark.parametrize(
    ("options", "processes", "asked"),
    [
        ({"tp_plan": "auto"}, 2, "tp_plan='auto'"),
        ({"tp_plan": "auto"}, 1, "tp_plan='auto'"),
        ({"tp_size": 2}, 2, "tp_size=2"),
        ({"distributed_config": {"tp_size": 2, "tp_plan": {"layers.*.mlp.up_proj": "colwise"}}}, 2, "tp_plan={'lay"),
        ({"distributed_config": DistributedConfig(pp_size=2)}, 2, "pp_size=2"),
    ],
)
def test_a_model_divided_within_or_between_layers_is_refused(
    options, processes, asked, tiny_nsa_model, tmp_path, monkeypatch
):
    model = tiny_nsa_model()
    assert not model.tp_plan and not model.config.base_model_tp_plan and not model.supports_tp_plan, "others' plans"
    model.save_pretrained(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(NsaError, match=f"tensor or pipeline parallelism yet, got {asked}.*: use FSDP"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    monkeypatch.setenv("WORLD_SIZE", "1")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path, distributed_config={"fsdp_size": 1})
    with torch.no_grad():
        assert torch.equal(alone(tokens()).logits, model(tokens()).logits)


def test_autocast(tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens()
    with torch.no_grad():
        exact = model(x).logits
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x).logits
    assert (low - exact).norm() / exact.norm() < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(x, labels=x).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_attention_dropout_is_refused(tiny_nsa_model):
    model = tiny_nsa_model()
    for layer in model.attention_layers():
        layer.attention_dropout = 0.1
    model(tokens())
    with pytest.raises(NsaError, match="has no attention dropout"):
        model.train()(tokens())
