"""Students: from a configuration, a data set and a cache to a trained, exported network."""
