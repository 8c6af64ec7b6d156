"""What a user can cause: one clear line that says what was wrong and what to do."""


class UserError(ValueError):
    """A mistake in what was asked for. The command line prints its text and exits with code 2."""
