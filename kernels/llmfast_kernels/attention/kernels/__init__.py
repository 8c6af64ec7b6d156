"""The Triton code of attention: groups of arguments, the loop over keys, and three kernels."""
