"""What a user can mend."""


class UserError(ValueError):
    """One clear line: the value, what is allowed, the mend. Commands print it and leave with 2."""
