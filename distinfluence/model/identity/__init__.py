"""Tell whether two models or two data sets are the same: drawn samples, derivatives there, code and attributes."""
