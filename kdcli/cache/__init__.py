"""The cache: what teachers said, on disk, with proof of what it is. Knows no models and no images."""
