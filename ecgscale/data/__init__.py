"""From raw files to batches: sources, shards, order, stream, batch."""
