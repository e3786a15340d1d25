"""What the synthesis is made of: drafts, passes, strengths, verdicts, lineage, rounds."""
