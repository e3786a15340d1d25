"""Properties of texts: words, n-grams, tags, embeddings, repetition."""
