"""How tasks reach workers and come back, whatever happens to the workers."""
