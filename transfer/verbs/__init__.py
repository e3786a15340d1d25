"""The groups of the command line, and what all verbs share."""
