"""Reads a run directory and draws; never computes a number that is not in it, and needs no torch."""
