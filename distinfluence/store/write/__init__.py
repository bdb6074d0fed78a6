"""Writing a result: its arrays, its strips, and going on where a run stopped."""
