"""What of an answer counts where it is compared with the right one."""

import re
import unicodedata

LEADING_POINT = re.compile(r"^\.(?=\d)")
MARKS = " \t.,;:!?\"'`*()[]{}"  # around an answer, which do not make it another one


def bare(text: str) -> str:
    """Return a text without what makes no other answer of it: case, spaces, and the marks around it."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    without = LEADING_POINT.sub("0.", text.lstrip(MARKS.replace(".", ""))).strip(MARKS)
    return without or text  # an answer of marks alone is no empty one
