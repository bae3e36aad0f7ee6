"""The cache: teacher outputs on disk, with proof of what they are. Knows no models and no images."""
