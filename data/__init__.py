"""Images in, ordered uint8 batches out: preparation, shards, partition, pipeline. Knows neither trainer nor models."""
