"""Many requests at once: what runs in which step, and who has which block of the cache."""
