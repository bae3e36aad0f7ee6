"""The papers' claims, and kd's own, on real images that come inside packages."""
