"""Near-duplicates across data sets, by perceptual hash (P1 section 3)."""
