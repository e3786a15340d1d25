"""Three tiny trained language models (LLaMA, Mistral and Qwen architecture) with their SAEs and cards."""
