"""``kd cache``: looking at caches, checking, growing and moving them."""
