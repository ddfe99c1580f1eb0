"""How kernels are proven on a machine without a GPU: interpreted, lowered, compiled ahead of time, compared."""
