"""``model.generate`` on the executor."""
