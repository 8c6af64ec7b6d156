"""The Triton kernels of sampling, one per file, and the functions they share."""
