"""What models know of each other, and what distilling one into another changed (P3 sections 3 and 5.1)."""
