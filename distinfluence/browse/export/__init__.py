"""A result as tables, plots, one file of HTML or lines in a terminal."""
