"""``transfer models``: published SAEs that can be used by name, and which of them can be compared."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from transfer.core.console import set_quiet, show
from transfer.verbs.options import Json, Quiet

models = typer.Typer(
    help="Published SAEs of LLaMA, Mistral and Qwen models.", no_args_is_help=True, rich_markup_mode=None
)


@models.callback()
def group() -> None:
    """Published SAEs of LLaMA, Mistral and Qwen models."""


@models.command("ls")
def ls(
    family: Annotated[str, typer.Option(help="Only this family: LLaMA, Mistral or Qwen.")] = "",
    model: Annotated[str, typer.Option(help="Only this model: hub id, short name, or a part of the hub id.")] = "",
    layer: Annotated[int | None, typer.Option(min=0, help="Only this layer (hidden_states index).")] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Pairs across families at like depth, best first.")] = False,
    all_sites: Annotated[bool, typer.Option("--all", help="Also those that are no residual-stream SAEs.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Pairs shown.")] = 20,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Known SAEs by family, model and layer; needs no network and loads no weights.

    Without --layer one line a release; with it one line an SAE, as a configuration takes it.
    """
    set_quiet(quiet or as_json)
    from models.registry import comparable_pairs, known_saes, select_saes, summary

    chosen = select_saes(family=family, model=model, layer=layer, usable=not all_sites)
    if pairs:
        wanted = {s.ref for s in chosen}
        found = [p for p in comparable_pairs(known_saes()) if p.source.ref in wanted or p.target.ref in wanted]
        rows = [
            {
                "source": p.source.ref,
                "source_model": p.source.model,
                "target": p.target.ref,
                "target_model": p.target.model,
                "layers": [p.source.layer, p.target.layer],
                "apart": round(p.apart, 3),
                "same_recipe": p.same_recipe,
                "same_width": p.same_width,
            }
            for p in found[:limit]
        ]
        more = len(found) - len(rows)
        text = [
            f"{r['source']}  ~  {r['target']}\n    layers {r['layers'][0]} and {r['layers'][1]} "
            f"({r['source_model']}, {r['target_model']}); "
            f"{'same' if r['same_recipe'] else 'different'} recipe, {'same' if r['same_width'] else 'different'} width"
            for r in rows
        ]
        text += [f"and {more} more (--limit)"] if more > 0 else []
        show({"pairs": rows, "n": len(found)} if as_json else "\n".join(text) or "no comparable pair")
        return
    if layer is None:
        rows = summary(chosen)
        lines = []
        for row in rows:
            width = f"{row['width']:,}" if row["width"] else "width in its config"
            why = f"  ({row['refused']})" if row["refused"] else ""
            kind = "chat" if row["chat"] else "base"
            lines.append(f"{row['family']:<8} {row['model']} ({kind})  {row['example']}")
            lines.append(f"         layers {row['layers']}; {width}; {row['recipe']}{why}")
    else:
        rows = [dataclasses.asdict(s) for s in chosen]
        lines = [
            f"{s.ref}  {s.model}  layer {s.layer} ({s.depth:.2f} deep)  {s.recipe}"
            + (f"  {s.neuronpedia}" if s.neuronpedia else "")
            for s in chosen
        ]
    show({"saes": rows} if as_json else "\n".join(lines) or "no such SAE is known")
