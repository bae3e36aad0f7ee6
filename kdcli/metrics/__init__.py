"""Task-similarity metrics: pure functions over arrays; they know no caches and no models."""
