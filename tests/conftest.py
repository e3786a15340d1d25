"""Offline, one thread, and three tiny random models that every test may use."""

from __future__ import annotations

import os

# Before torch and transformers are imported anywhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import dataclasses
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from transfer.core.console import set_quiet

# The same examples every time, so that a red run is the change's fault; HYPOTHESIS_PROFILE=explore draws new ones.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

SENTENCES = [
    "How do I bake a chocolate cake without eggs?",
    "Please write a short poem about the autumn rain in Lisbon.",
    "What is the capital of Mongolia, and how many people live there?",
    "Explain how a bicycle stays upright while it is moving.",
    "Give me three ideas for a birthday present under 20 dollars.",
    "def add(a, b):\n    return a + b  # what does this function do?",
    "My neighbour's dog barks all night; what can I do about it?",
    "Translate 'good morning' to Japanese: おはようございます.",
    "Summarise the plot of Hamlet in two sentences 🙂",
    "Tell me a joke about computers and coffee.",
    "Why is the sky blue at noon and red in the evening?",
    "List the planets of the solar system in order of size.",
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may leave this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> Any:
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in ("localhost", "127.0.0.1", "::1"):
            raise OSError(f"Tests are offline, but one wanted to reach {host}.")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


SHAPES: dict[str, dict[str, int]] = {
    "llama": dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2),
    "mistral": dict(hidden_size=40, num_attention_heads=4, num_key_value_heads=2, head_dim=12),
    "qwen": dict(hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
}


def build_tiny(name: str, folder: Path) -> Path:
    """A random model of one family with a tokenizer and a random TopK SAE on layer 2 (in ``sae``)."""
    import torch
    from sae_lens import TopKSAE, TopKSAEConfig
    from transformers import AutoModelForCausalLM

    from models.checkpoint import no_bars
    from models.zoo.recipe import ZOO
    from models.zoo.tokenizer import train_tokenizer

    torch.set_num_threads(1)
    shape = {"intermediate_size": 64, "num_hidden_layers": 3, **SHAPES[name]}
    spec = dataclasses.replace(ZOO[name], vocab_size=512, hook_layer=2, shape=shape)
    tokenizer: Any = train_tokenizer(spec, SENTENCES * 4, folder)
    spec = dataclasses.replace(spec, vocab_size=len(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = spec.config(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                # A norm weight of one everywhere would hide a missing norm.
                parameter.data.uniform_(0.5, 1.5)
            else:
                parameter.data.mul_(8)
        with no_bars():
            model.save_pretrained(folder)
        metadata: Any = {"layer": 2, "hook_name": "blocks.1.hook_resid_post", "model_name": name}
        sae = TopKSAE(TopKSAEConfig(d_in=shape["hidden_size"], d_sae=64, k=4))
        sae.b_enc.data.normal_(std=0.05)
        sae.b_dec.data.normal_(std=0.05)
        for key, value in metadata.items():
            sae.cfg.metadata[key] = value
        sae.save_model(folder / "sae")
    return folder


@pytest.fixture(autouse=True)
def _told() -> Iterator[None]:
    """Status lines are silent only in the test that asked for it."""
    yield
    set_quiet(False)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a random LLaMA model (hidden 32, 3 layers), tokenizer and ``sae``."""
    return build_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a random Mistral model (hidden 40, 3 layers), tokenizer and ``sae``."""
    return build_tiny("mistral", tmp_path_factory.mktemp("tiny") / "mistral")


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a random Qwen3 model (hidden 48, 3 layers), tokenizer and ``sae``."""
    return build_tiny("qwen", tmp_path_factory.mktemp("tiny") / "qwen")


@pytest.fixture
def public_data() -> Iterator[Path]:
    """The public data folder; skips with a reason where it is absent."""
    folder = Path(os.environ.get("TRANSFER_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the public data folder {folder} is not there")
    yield folder
