"""``kd export``: students for others."""
