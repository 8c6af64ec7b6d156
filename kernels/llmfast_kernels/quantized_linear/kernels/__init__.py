"""The main loops for any GPU, in Triton, and what they share; those for Hopper are in hopper/."""
