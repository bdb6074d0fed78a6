"""Data sets cut into chunks, where the chunks come from, and models that travel as recipes."""
