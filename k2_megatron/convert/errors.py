"""What a conversion refuses: the message names the file, what was found, and the remedy."""

from k2_megatron.runtime.tool import NOT_SOUND


class ConversionError(ValueError):
    """A checkpoint that cannot be converted, read or trusted."""


class ProofFailed(ConversionError):
    """A checkpoint that is not as it was saved, or a result that is not what was read: nothing is published."""

    exit_code = NOT_SOUND
