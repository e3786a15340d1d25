"""Cross-model transfer analysis: the stages, the pipeline and the command line."""

__version__ = "0.1.0"
