"""Harvest: tokens per second against a bare stopped forward (the limit) and two peers.

Everything runs with one torch thread, as the command line sets it. Ours encodes in a thread of its own beside the
forward pass, so on one core alone it would stay some 20 % below the limit on the zoo, where the encoder is a good part.

Work per token of a model with d_model d, L layers read and SAE width n: about 24·d²·L FLOP for the layers and 2·d·n
for the encoder. On the zoo the encoder is a good part of the whole; on the wider model some per cent, as in real ones.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import torch

from models.activations import harvest
from models.adapter import Adapter
from models.language import LanguageModel
from models.sae import Dictionary
from tests.benchmarks.case import measure, row
from transfer.core.texts import Corpus
from transfer.corpus import load_corpus

PEERS = {
    "hidden": "transformers full forward, output_hidden_states=True (no SAE)",
    "loop": "per-text loop, full forward with hidden states, dense SAELens encode, max over tokens",
}


def wide(folder: Path) -> Adapter:
    """Eight of sixteen layers of width 768 with an SAE of 8,192 features, random weights, the zoo's LLaMA tokenizer."""
    from sae_lens import TopKSAE, TopKSAEConfig
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).resolve().parents[2] / "models" / "zoo" / "llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sae = TopKSAE(TopKSAEConfig(d_in=768, d_sae=8192, k=32))
    torch.nn.init.normal_(sae.W_enc, std=0.02)
    sae.save_model(folder / "sae")
    return Adapter.join(LanguageModel.load(f"path:{folder}"), Dictionary.load(f"path:{folder / 'sae'}"), layer=8)


def case(name: str, adapter: Adapter, corpus: Corpus, rounds: int) -> None:
    """One model."""
    language, sae, layer = adapter.language, adapter.dictionary, adapter.space.layer
    rendered = language.render_many([t.text for t in corpus])
    tokens = sum(len(r.ids) for r in rendered)
    base = language.model.base_model

    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    # The same batches for the limit and the first peer: sorted by length, 1,024 padded tokens (the fastest on CPU).
    order = np.argsort([len(r.ids) for r in rendered], kind="stable")
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * len(rendered[order[end]].ids) <= 1024:
            end += 1
        rows = [rendered[i].ids for i in order[start:end]]
        width = max(map(len, rows))
        ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
        batches.append((ids, mask))
        start = end

    @torch.no_grad()
    def bare() -> None:
        handle = base.layers[layer - 1].register_forward_hook(stop)
        try:
            for ids, mask in batches:
                with contextlib.suppress(Stop):
                    base(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            handle.remove()

    @torch.no_grad()
    def hidden() -> None:
        for ids, mask in batches:
            language.model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)

    few = rendered[: max(1, len(rendered) // 8)]
    few_tokens = sum(len(r.ids) for r in few)

    @torch.no_grad()
    def loop() -> None:
        for r in few:
            out = language.model(
                input_ids=torch.tensor([r.ids]), use_cache=False, output_hidden_states=True
            ).hidden_states[layer][0]
            sae.sae.encode(out[r.content]).max(dim=0)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            harvest(adapter, corpus, Path(folder) / "store", keep_residual=False)

    taken = measure({"ours": ours, "bare": bare, "hidden": hidden, "loop": loop}, rounds)
    speed = {n: (few_tokens if n == "loop" else tokens) / s for n, s in taken.items()}
    for peer, words in PEERS.items():
        row(f"harvest.{name}.{peer}", speed["ours"], words, speed[peer], "tokens/s", speed["bare"])


def main() -> None:
    """Zoo models on the bundled set, and the wider random model on a part of it."""
    corpus = load_corpus("bundled:requests")
    for member in ("llama", "mistral", "qwen"):
        case(f"zoo-{member}", Adapter.load(f"zoo:{member}", f"zoo:{member}/sae"), corpus, rounds=3)
    with tempfile.TemporaryDirectory() as folder:
        part = Corpus("part", corpus.texts[:64])
        case("wide-768x8-8192", wide(Path(folder)), part, rounds=2)
