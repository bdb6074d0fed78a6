"""Layers as curvature with Kronecker structure sees them: inputs, output gradients, and the parameters between."""
