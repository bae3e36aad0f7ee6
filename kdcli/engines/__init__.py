"""Several supervised processes of one command: here, by Slurm, or on Ray."""
