"""Models that are trained again on parts of the data, and the losses of theirs that are kept."""
