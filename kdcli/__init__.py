"""kd: expensive teachers run once, their outputs are cached, students are served from the cache."""

__version__ = "0.1.0.dev0"
