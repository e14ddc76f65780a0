"""Files to packed batches: records, prompts, decoding, the feature store, the batch plan, the synthetic world."""
