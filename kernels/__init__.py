"""Triton kernels, installed as ``fusedres.kernels``."""
