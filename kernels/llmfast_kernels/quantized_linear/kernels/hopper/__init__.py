"""Main loops for Hopper (sm_90): TMA rings and WGMMA, in Gluon, Triton's language below the tiles.

Warps of one program that do different work cannot be expressed in Triton. Nothing here runs in
Triton's interpreter.
"""
