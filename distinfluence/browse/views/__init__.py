"""What the page shows, one file a view: numbers and pictures out of a result."""
