"""How models are trained again: many small networks at once, to the minimum, or by a script."""
