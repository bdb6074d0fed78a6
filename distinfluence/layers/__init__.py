"""Layers as curvature with Kronecker structure sees them: inputs, output gradients, and the parameters between."""

from distinfluence.layers.layout import Layout, Record, layout_of
from distinfluence.layers.units import Unit

__all__ = ["Layout", "Record", "Unit", "layout_of"]
