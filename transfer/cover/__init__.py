"""What coverage is made of: thresholds, tallies, divergences, curves, and selection by marginal gain."""
