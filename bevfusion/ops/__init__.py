"""Operators of the float model: voxelisation, BEV pooling and sparse convolution."""
