"""The SAEBench adapter has what SAEBench uses, and is the dictionary in units of unit decoder rows."""

from __future__ import annotations

import json

import pytest
import torch
from format_cases import CASES, CONFIG, D, F, K, assert_same, inputs

from dictionary_learning.dictionary import IdentityDict
from dictionary_learning.formats import CannotHold
from dictionary_learning.formats.coder import as_coder
from dictionary_learning.formats.saebench import saebench_sae

autoencoders = [case for case in CASES if "transcoder" not in case and "groupmax" not in case]
every_case = pytest.mark.parametrize("case", autoencoders)


@every_case
def test_it_computes_what_the_dictionary_does_on_2d_and_3d_input(case: str) -> None:
    dictionary, x = CASES[case](), inputs()
    sae, norms = saebench_sae(dictionary, CONFIG), dictionary.decoder_rows.norm(dim=1)
    for shaped in (x, x.flatten(0, 1)):
        f = dictionary.encode(shaped)
        assert_same((sae.encode(shaped), sae(shaped)), (f * norms, dictionary.decode(f)))
        torch.testing.assert_close(sae.decode(f * norms), dictionary.decode(f), atol=1e-5, rtol=1e-5)
        assert torch.equal(sae.encode(shaped) != 0, f != 0)


@every_case
def test_its_parameters_have_the_layout_and_norms_that_saebench_checks(case: str) -> None:
    sae = saebench_sae(CASES[case](), CONFIG)
    shapes = {name: tuple(parameter.shape) for name, parameter in sae.named_parameters()}
    assert shapes == {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F), atol=1e-5, rtol=0)
    assert sae.device == torch.device("cpu") and sae.dtype == torch.float32


def test_its_config_has_the_fields_that_saebench_reads() -> None:
    sae = saebench_sae(CASES["topk"](), CONFIG)
    cfg = sae.cfg.to_dict()
    asked = {
        "model_name": "gpt2",
        "d_in": D,
        "d_sae": F,
        "hook_layer": 8,
        "hook_name": "blocks.8.hook_resid_post",
        "architecture": "topk",
        "context_size": 128,
        "hook_head_index": None,
        "prepend_bos": True,
        "dtype": "float32",
        "normalize_activations": "none",
        "dataset_path": "embedded",
    }
    assert asked.items() <= cfg.items() and cfg["activation_fn_kwargs"] == {"k": K}
    json.dumps(cfg)
    assert sae.cfg.d_sae == F and not any(parameter.requires_grad for parameter in sae.parameters())
    assert saebench_sae(CASES["relu"](), CONFIG, model_name="gpt2-small").cfg.model_name == "gpt2-small"


def test_it_moves_to_another_data_type_and_says_so() -> None:
    sae = saebench_sae(CASES["jumprelu"](), CONFIG).to(dtype=torch.bfloat16)
    assert sae.dtype == torch.bfloat16 and sae.cfg.dtype == "bfloat16" and sae.threshold.dtype == torch.bfloat16
    assert sae(inputs()).dtype == torch.bfloat16


def test_a_latent_without_a_direction_stays_without_one() -> None:
    dictionary, x = CASES["topk, decoder of other norms"](), inputs()
    with torch.no_grad():
        dictionary.decoder_rows[3] = 0
    sae = saebench_sae(dictionary, CONFIG)
    assert torch.isfinite(sae.W_dec).all() and not sae.W_dec[3].any()
    torch.testing.assert_close(sae(x), dictionary(x), atol=1e-5, rtol=1e-5)


def test_it_shares_nothing_with_the_dictionary() -> None:
    dictionary = CASES["jumprelu"]()
    before = as_coder(dictionary)
    sae = saebench_sae(dictionary, CONFIG)
    with torch.no_grad():
        for tensor in (*sae.parameters(), *sae.buffers()):
            tensor.zero_()
    after = as_coder(dictionary)
    assert torch.equal(after.encoder_FD, before.encoder_FD) and torch.equal(after.threshold_F, before.threshold_F)


@pytest.mark.parametrize(("case", "why"), [("relu transcoder", "this is a transcoder"), ("groupmax", "Group-max has")])
def test_what_it_has_no_place_for_is_refused(case: str, why: str) -> None:
    with pytest.raises(CannotHold, match=why):
        saebench_sae(CASES[case](), CONFIG)


def test_the_identity_is_refused() -> None:
    with pytest.raises(CannotHold, match="IdentityDict can't be exported"):
        saebench_sae(IdentityDict(D), CONFIG)
