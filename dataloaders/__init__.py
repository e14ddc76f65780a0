"""Files to packed batches: records, prompts, decoding, the feature store, the batch plan, the synthetic world."""

from dataloaders.cpu import set_wait_policy

set_wait_policy()
