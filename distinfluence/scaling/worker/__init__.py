"""What a worker process holds: the model, chunks, a device, its log."""
