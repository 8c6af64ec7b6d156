"""``python -m llmfast`` is the program ``llmfast``."""

from .cli.main import main

main()
