"""Instructions in one spelling, so that what means the same is the same."""

import re
import unicodedata

QUOTES = {ord(fancy): plain for fancy, plain in zip("‘’‚`´“”„«»", "'''''\"\"\"\"\"", strict=True)}


def normalise_instruction(text: str) -> str:
    """Bring an instruction into lower case, with plain quotes, single blanks, and no quotes or stops around it.

    What is no instruction, only blanks, quotes or stops, becomes "".
    """
    plain = unicodedata.normalize("NFKC", text).translate(QUOTES).lower()
    plain = re.sub(r"\s+", " ", plain)
    plain = re.sub(r"\s+([,.;:!?])", r"\1", plain)
    return plain.strip(" \"'.,;:!")
