"""Storage backends: how the chunks of a cache lie on disk."""
