"""Function vectors: which attention heads carry a task, the vector they write, and steering with it."""
