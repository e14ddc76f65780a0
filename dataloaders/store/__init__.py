"""Features on disk: safetensors shards with a Parquet index. `python -m dataloaders.store --help`."""
