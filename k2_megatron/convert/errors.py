"""The mistake of a conversion that a user can mend: the message names the file, what was found, and the remedy."""


class ConversionError(ValueError):
    """A checkpoint that cannot be converted, read or trusted."""
