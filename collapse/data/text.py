"""Normalizes text to the form of the language models' own corpus."""

import re
import unicodedata


def corpus_text(text: str) -> str:
    """A text as the corpus is written: lower-case letters a to z, one space between words.

    Accents fall off their letters; digits, punctuation and other scripts end a word. Text without
    any letter becomes "".
    """
    plain = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return " ".join(re.findall("[a-z]+", plain))
