"""What all processes agree on. This package imports nothing else of ours."""
