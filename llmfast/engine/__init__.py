"""The engine serves many requests at once: scheduling, prefixes, sampling parameters, outputs."""
