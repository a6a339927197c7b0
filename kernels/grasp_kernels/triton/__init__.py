"""Triton kernels and their launchers; a folder of their own, since a module of an op's name would hide the op."""
