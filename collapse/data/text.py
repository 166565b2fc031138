"""Text as the language models' own corpus has it."""

import re
import unicodedata


def corpus_text(text: str) -> str:
    """Any text as the corpus has it: lower-case letters a to z, one space between words.

    Accents fall off their letters; digits, punctuation and other scripts end a word. Text without
    any letter becomes "".
    """
    plain = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return " ".join(re.findall("[a-z]+", plain))
