"""What a model costs and what it is worth: timing, results files, quality."""
