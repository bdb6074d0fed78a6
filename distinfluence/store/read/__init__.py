"""Reading a result: arrays, rankings, annotations, tables."""
