"""nsa_hf/adapters.py and projections.py: PEFT's adapters on sparse models."""

from __future__ import annotations

import copy
import subprocess
import sys

import peft.tuners.tuners_utils as tuners
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.utils import constants
from tiny_families import tiny_dense
from tiny_models import SELECTORS, TINY_SIZES, tiny_dense_model

import nsa_hf
from nsa_hf import adapters
from nsa_hf.discovery import causal_model_types, find_family
from nsa_hf.errors import NotPlain
from nsa_hf.projections import default_targets

IDS = torch.randint(256, (2, 150), generator=torch.Generator().manual_seed(0))


def trained(model) -> set[str]:
    """The modules of the first layer whose parameters are trained, without PEFT's own names."""
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad and ".layers.0." in name)
    own = (".lora_", ".ia3_", ".modules_to_save")
    return {min((name.partition(part)[0] for part in own), key=len).partition(".layers.0.")[2] for name in names}


def stir(model) -> None:
    """Random values for all that is trained: a new adapter changes nothing."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize(
    "code",
    ["import peft, nsa_hf", "import nsa_hf; nsa_hf.NsaQwen2MoeForCausalLM; import peft"],
    ids=["theirs first", "ours first"],
)
def test_rows_are_there_whichever_is_imported_first(code):
    code += """
import nsa_hf
nsa_hf.NsaQwen2MoeForCausalLM, nsa_hf.NsaLlamaForCausalLM
from peft.utils import constants
from peft.tuners import tuners_utils
from peft.tuners.randlora import model as randlora
lora = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
find = [module._maybe_include_all_linear_layers.__code__.co_name for module in (tuners_utils, randlora)]
print(lora["nsa_qwen2_moe"], lora["nsa_llama"], *find)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "['q_proj', 'v_proj'] ['q_proj', 'v_proj'] find_dense_layers find_dense_layers", (
        done.stderr
    )


def test_every_family_has_targets():
    found = {}
    for model_type in causal_model_types():
        try:
            found[model_type] = default_targets(find_family(model_type))
        except NotPlain:
            continue
    assert len(found) > 80
    unusual = {name: targets.lora for name, targets in found.items() if targets.lora != ["q_proj", "v_proj"]}
    expected = {
        "codegen": ["qkv_proj"],
        "ctrl": ["Wq", "Wv"],
        "gpt_neox": ["query_key_value"],
        "jetmoe": ["kv_proj"],
        "persimmon": ["query_key_value"],
        "phi3": ["qkv_proj"],
    }
    # older releases have not all of them
    assert unusual == {name: targets for name, targets in expected.items() if name in found} and "phi3" in found
    assert all(targets.ia3 and {*targets.feedforward} <= {*targets.ia3} for targets in found.values())
    lora, ia3 = (getattr(constants, name) for name in (adapters.LORA, adapters.IA3))
    # where PEFT has a family's rows, ours would be the same for all that are called alike
    for name in ("llama", "mistral"):
        assert (found[name].lora, {*found[name].ia3}) == (lora[name], {*ia3[name]})


@pytest.mark.parametrize("model_type", ["phi3", "gpt_neox", "qwen3_moe"])
@pytest.mark.parametrize("kind", [LoraConfig, IA3Config])
def test_the_defaults_fit_a_model(model_type, kind):
    family = find_family(model_type)
    sparse = getattr(nsa_hf, family.sparse_name(family.causal_lm))
    adapted = get_peft_model(sparse.from_dense(tiny_dense(model_type)), kind(task_type="CAUSAL_LM"))
    assert trained(adapted) and not any(".nsa." in name for name in trained(adapted))


def test_a_users_own_row_stays(monkeypatch):
    table = {"llama": ["q_proj"], "nsa_llama": ["o_proj"]}
    monkeypatch.setattr(constants, adapters.LORA, table)
    adapters.add_rows(constants, adapters.Family("nsa_llama", "llama", lambda: pytest.fail("not needed")))
    assert table["nsa_llama"] == ["o_proj"]


@pytest.mark.parametrize("kind", [LoraConfig, IA3Config])
def test_all_linear_is_the_dense_models(kind, tiny_nsa_model):
    feedforward = {"feedforward_modules": []} if kind is IA3Config else {}
    expected = trained(get_peft_model(tiny_dense_model(), kind(target_modules="all-linear", **feedforward)))
    adapted = get_peft_model(tiny_nsa_model(), kind(target_modules="all-linear", **feedforward))
    assert trained(adapted) == expected and len(expected) == 7
    named = get_peft_model(tiny_nsa_model(), LoraConfig(target_modules=["nsa.gate.up", "v_proj"]))
    assert trained(named) == {"self_attn.nsa.gate.up", "self_attn.v_proj"}


def test_a_peft_without_that_function_is_warned_of():
    with pytest.warns(UserWarning, match=r"give exclude_modules=\['nsa.gate', 'nsa.compress_k', 'nsa.compress_v'\]"):
        adapters.narrow_all_linear(type(tuners)("tuners_utils"))


@pytest.mark.parametrize("selector", ["compressed", "channels"])
def test_the_loss_is_the_one_computed_by_hand(selector, tiny_nsa_model):
    """Of the adapter's definition: W + B A * alpha / r, and the mean of -log p of each next token."""
    base = tiny_nsa_model(**SELECTORS[selector])
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM"))
    stir(adapted)
    for name, layer in adapted.base_model.model.named_modules():
        if name.endswith(("self_attn.q_proj", "self_attn.v_proj")):
            down, up = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
            base.get_submodule(name).weight.data += up @ down * 12 / 4
    log_p = logits(base)[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])
    loss = adapted(input_ids=IDS, labels=IDS).loss
    assert loss.item() == pytest.approx(-log_p.mean().item(), abs=1e-4)
    loss.backward()
    gradients = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("options", [{}, {"nsa_branch_kv": "independent"}], ids=["shared", "independent"])
def test_new_parameters_are_trained_whole_and_saved(options, tiny_nsa_model, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", modules_to_save=[*adapters.NEW_MODULES])
    adapted = get_peft_model(tiny_nsa_model(**options), config)
    assert {f"self_attn.{name}" for name in adapters.NEW_MODULES} <= trained(adapted)
    stir(adapted)
    before = logits(adapted.eval())
    assert (before - logits(tiny_nsa_model(**options))).abs().max() > 1e-2
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), logits(tiny_nsa_model(**options)), atol=2e-5, rtol=0)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_nsa_model(**options), tmp_path)
    saved, loaded = adapted.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    # the same numbers at other addresses: their sums are rounded in another order
    torch.testing.assert_close(logits(again), before, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(again.merge_and_unload()), before, atol=1e-4, rtol=0)


def test_a_dense_models_adapter_and_the_other_way_round(tmp_path):
    """In the exact range they are one model: what adapts the one adapts the other."""
    sizes = {**TINY_SIZES, "nsa_topk": 10}
    dense, sparse = tiny_dense_model(), nsa_hf.NsaLlamaForCausalLM.from_dense(tiny_dense_model(), **sizes)
    plain = logits(dense)
    for name, (one, other) in {"there": (dense, sparse), "back": (sparse, dense)}.items():
        adapted = get_peft_model(copy.deepcopy(one), LoraConfig(task_type="CAUSAL_LM")).eval()
        stir(adapted)
        adapted.save_pretrained(tmp_path / name)
        carried = PeftModel.from_pretrained(copy.deepcopy(other), tmp_path / name)
        torch.testing.assert_close(logits(carried), logits(adapted), atol=1e-3, rtol=0)
        assert (logits(carried) - plain).abs().max() > 0.1


def test_an_adapted_model_generates_with_its_cache(tiny_nsa_model):
    adapted = get_peft_model(tiny_nsa_model(), LoraConfig(task_type="CAUSAL_LM")).eval()
    stir(adapted)
    given = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached, anew = (adapted.generate(input_ids=IDS, use_cache=use, **given) for use in (True, False))
    assert torch.equal(cached, anew)
