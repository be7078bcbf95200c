"""What others recorded, as it becomes demonstrations."""
