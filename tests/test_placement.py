"""Dtype and device of a model reach everything that loads it again by name, worker processes included."""

from __future__ import annotations

import os

import pytest
import torch

from models.adapter import Adapter
from models.language import LanguageModel, kept_language
from models.placement import PLAIN, place, placed
from transfer.core.errors import TransferError
from transfer.core.experiment import load_experiment
from transfer.train.classifier import load_backbone


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.setenv("TRANSFER_PLACES", "{}")


def test_what_an_adapter_was_loaded_with_is_how_its_model_is_loaded_again(tiny_llama, tiny_qwen):
    ref = f"path:{tiny_llama}"
    plain = kept_language(ref)
    assert placed(ref) == PLAIN and plain.model.dtype == torch.float32
    adapter = Adapter.load(ref, f"{ref}/sae", dtype="bfloat16")
    again = kept_language(ref)
    assert again.model.dtype == torch.bfloat16 and again is kept_language(ref)
    assert again.hash == adapter.space.model_hash != plain.hash, "content keys tell the dtypes apart"
    assert load_backbone(ref).hash == again.hash
    assert next(load_backbone(ref).model.parameters()).dtype == torch.float32, "what is trained is float32"
    assert "bfloat16" in os.environ["TRANSFER_PLACES"], "worker processes inherit it"
    assert kept_language(f"path:{tiny_qwen}").model.dtype == torch.float32
    place(ref, dtype="float32", device="cpu")
    assert kept_language(ref).hash == plain.hash


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_one_sentence(tiny_llama):
    with pytest.raises(TransferError, match="cannot be put on 'cuda:0'"):
        LanguageModel.load(f"path:{tiny_llama}", device="cuda:0")


def test_the_configuration_knows_both():
    section = load_experiment("demo", ["models.llama.dtype=bfloat16", "models.llama.device=cuda:1"]).models["llama"]
    assert (section.dtype, section.device) == ("bfloat16", "cuda:1")
    for wrong in ("models.llama.device=gpu", "models.llama.dtype=int8"):
        with pytest.raises(TransferError, match=wrong.split("=")[0]):
            load_experiment("demo", [wrong])
