"""Decoder blocks: a mixer and a feed-forward part between norms, built from a traced layer."""
