"""Clusters to run on: Dask's own, batch systems, and what watches them."""
