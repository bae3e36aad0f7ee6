"""Caches for one's own code: arrays by teacher and key, and images with them for one's own loop."""
