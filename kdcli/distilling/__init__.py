"""``kd distill``: from a folder of images to a student, by the other commands."""
