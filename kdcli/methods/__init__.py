"""What a student learns from: one paper is one file, losses are pure functions."""
