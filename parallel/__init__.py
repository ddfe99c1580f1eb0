"""Meshes, plans and collectives of jaxllm; knows ``pallas_kernels``, never ``jaxllm``."""

PROJECT = "jaxllm"
