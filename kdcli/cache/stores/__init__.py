"""Caches in object stores: pushed there, and pulled from there."""
