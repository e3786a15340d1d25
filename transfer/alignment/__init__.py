"""Saved alignments: fitted, scored, described, exported, checked by intervention, joined to families."""
