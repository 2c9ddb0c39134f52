"""The Segment Anything models: building, weights, checkpoints, embeddings and decoding."""
