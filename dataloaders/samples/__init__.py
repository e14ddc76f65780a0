"""Conversations to packed batches: prompts, tokenization, batch plan, collation, prefetch."""
