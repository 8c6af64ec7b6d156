"""Code that the families share: device facts, launching, dependent launch, argument checks."""
