"""What lies on the disk: arrays, fingerprints, rankings, and the folder or address that holds them."""
