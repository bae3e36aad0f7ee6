"""Work on whole caches: pack, merge, remove, list, compare, check."""
