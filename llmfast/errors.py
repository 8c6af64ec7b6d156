"""Errors that a user can cause: one clear line that says what was wrong and what to do."""


class UserError(ValueError):
    """A mistake in a request. The command line prints its text and exits with code 2."""


class ArgumentError(ValueError):
    """A value that an argument must not have.

    Attributes:
        operation: the function or class that was called.
        argument: its argument's name.
        reason: the rest of the sentence: "must be ...; got ...".
    """

    def __init__(self, operation: str, argument: str, reason: str) -> None:
        super().__init__(operation, argument, reason)  # as arguments, so that it can be pickled
        self.operation, self.argument, self.reason = operation, argument, reason

    def __str__(self) -> str:
        return f"{self.operation}: {self.argument} {self.reason}"
