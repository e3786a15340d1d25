"""What says what a feature is about, and whether it matters: spans, statistics, judges, detection."""
