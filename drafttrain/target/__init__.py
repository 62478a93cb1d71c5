"""The frozen model: a transformers causal LM as it is, its rollback-able KV cache, its head alone, plain generation."""
