"""``make bench``: every case, one JSON line each; name areas to run only these."""

from __future__ import annotations

import importlib
import sys

import torch

AREAS = (
    "cli",
    "harvest",
    "token_align",
    "stitch",
    "topk",
    "corr",
    "assign",
    "ot",
    "align",
    "coverage",
    "fv",
    "finetune",
)


def main() -> None:
    """Run the areas named on the command line, or all."""
    torch.set_num_threads(1)
    from transformers.utils import logging

    from transfer.core.console import set_quiet

    set_quiet(True)
    logging.disable_progress_bar()
    for area in sys.argv[1:] or AREAS:
        importlib.import_module(f"tests.benchmarks.{area}").main()


if __name__ == "__main__":
    main()
