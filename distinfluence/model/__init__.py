"""The user's model, read only: batches, blocks, losses, gradients, and the risk that they make."""
