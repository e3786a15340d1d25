"""Real LLaMA weights that nobody here trained go through the same adapter."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from models.language import LanguageModel
from models.stories import convert
from transfer.core.errors import TransferError


@pytest.mark.data
def test_stories260k_decodes_its_documented_text(public_data: Path, tmp_path: Path) -> None:
    source = public_data / "weights" / "stories260K"
    convert(source / "stories260K.bin", source / "tok512.bin", tmp_path)
    language = LanguageModel.load(f"path:{tmp_path}")
    assert (language.family.name, language.d_model, language.n_layers) == ("LLaMA", 64, 5)
    block = (source / "stories260K.md").read_text("utf8").split("-t 0.0\n", 1)[1].split("```", 1)[0]
    documented = block.strip()
    made = language.generate([""], max_new_tokens=256, temperature=0.0)[0].strip()
    assert documented.startswith("Once upon a time, there was a little girl named Lily.") and len(documented) > 500
    assert made.startswith(documented)
    # Without the cache, one layer at a time, the adapter reads the same stream.
    r = language.render(documented[:60])
    assert r.ids[0] == 1 and r.ends[-1] == 60 and language.template_offset == 1


def checkpoint(folder: Path, *, shared: bool) -> tuple[Path, Path]:
    """A small random checkpoint of the same layout: 2 layers, dim 8, 2 heads, 1 kv head, 262 tokens."""
    dim, hidden, layers, heads, kv, vocab, length = 8, 12, 2, 2, 1, 262, 16
    sizes = (
        vocab * dim + layers * dim + layers * dim * dim * 2 + layers * (kv * 4) * dim * 2 + layers * dim
        + 3 * layers * hidden * dim + dim + length * 4 + (0 if shared else vocab * dim)
    )  # fmt: skip
    weights = np.random.default_rng(0).normal(size=sizes).astype("<f4")
    header = struct.pack("<7i", dim, hidden, layers, heads, kv, vocab if shared else -vocab, length)
    (folder / "w.bin").write_bytes(header + weights.tobytes())
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{b:02X}>" for b in range(256)), " ", "a", " a"]
    body = b"".join(struct.pack("<fi", -float(i), len(p.encode())) + p.encode() for i, p in enumerate(pieces))
    (folder / "t.bin").write_bytes(struct.pack("<i", 6) + body)
    return folder / "w.bin", folder / "t.bin"


@pytest.mark.parametrize("shared", [True, False])
def test_layout(shared: bool, tmp_path: Path) -> None:
    out = convert(*checkpoint(tmp_path, shared=shared), tmp_path / "out")
    language = LanguageModel.load(f"path:{out}")
    assert language.tokenizer("a a")["input_ids"] == [1, 261, 261]
    assert (language.model.lm_head.weight is language.model.model.embed_tokens.weight) == shared
    assert len(language.capture([[1, 261]], 2)[0]) == 2


def test_broken_files_are_refused(tmp_path: Path) -> None:
    weights, tokens = checkpoint(tmp_path, shared=True)
    whole = weights.read_bytes()
    for data, words in ((whole[:-4], "cut short"), (whole + b"\0" * 8, "2 numbers too many"), (b"x", "no llama2.c")):
        weights.write_bytes(data)
        with pytest.raises(TransferError, match=words):
            convert(weights, tokens, tmp_path / "out")
    weights.write_bytes(whole)
    tokens.write_bytes(tokens.read_bytes()[:-5])
    with pytest.raises(TransferError, match="no llama2.c tokenizer"):
        convert(weights, tokens, tmp_path / "out")
    assert not (tmp_path / "out").exists()
