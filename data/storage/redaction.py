"""Makes a text safe to show: replaces passwords, tokens and keys by ***, and escapes control characters."""

import re
from typing import Any

HIDDEN = "***"
"""What is shown instead of a secret."""
_HOST_AND_PORT = r"(?:[^/?\#\s:@]*@)?(?:localhost|[\w-]+\.[\w.-]+|\[[\da-f:.]+\]):\d{1,5}(?:[/?\#\s]|$)"
_USER = re.compile(
    rf"""(?ix)
    (?<=://) (?:
        (?!{_HOST_AND_PORT}) [^/?\#\s:]* : \S* @  # user:password@; people write / ? \# and @ in it as they are
        | [^/?\#\s]* @                            # token@, me@company:password@
        | [^/?\#\s:@]* : (?!\s) [^/@\n"']* @        # user:pass word@; no URL, but people write it
    )
    | (?<=%3a%2f%2f) (?: (?:(?!%2f|%3a)[^/\s&])* %3a [^\s&]* | (?:(?!%2f)[^/\s&])* ) %40  # in a URL in a URL
    | (?:(?<=\bhttp:)|(?<=\bhttps:)|(?<=\bs3:)) (?:/|///)? [^/?\#\s:@]+ : \S+ @  # too few or too many slashes
    """
)
"""The part of a URL before the host. A raw slash in a password makes a URL invalid, but messages still show the URL.
Therefore a short name with a number, as in `mlflow:5000/a@b`, counts as a user, not as a host and port."""
_SECRET_FIELDS = re.compile(
    r"""(?ix)
    (?P<name>
        (?:
            password|passwd|passphrase|pwd|secret|token|credential|signature
            | (?:api|access|account|auth|client|encryption|private|secret|shared)[_-]?key
            | (?<=[?&\#;]) (?:auth|code|key|pass|pw|sig)
        )
        (?: = | ["']\s*:\s*(?=["']) )
        | \b authorization ["']? \s*[:=]\s* ["']? (?:basic|bearer)\s+
    )
    (?: "[^"]*" | '[^']*' | (?: [^&\s"':,;.)] | [:,;.)](?![:,;.)]*(?:\s|$)) | ["'](?=[^\s"',;:)\]}>]) )+ )
    """
)
"""name=value in queries, connection strings and environments; 'name': 'value'; the HTTP Authorization header."""
_ENCODED_FIELDS = re.compile(r"(?i)((?:password|secret|token|credential|signature|key|sig)%3d)(?:(?!%26)[^&\s'\"])+")


def _hidden(user: re.Match[str]) -> str:
    return "***%40" if user[0].endswith("%40") else "***@"


def redact(text: str) -> str:
    """Replace possible secrets by ***: users and passwords in URLs, and secret fields.

    Works on one URL or on a message with several. In doubt it hides more: from the start of a password to the last @
    before a blank. Other text is unchanged. Redacting twice equals redacting once.
    """
    text = _USER.sub(_hidden, text)
    return _ENCODED_FIELDS.sub(r"\1***", _SECRET_FIELDS.sub(r"\g<name>***", text))


def escaped(text: str, *, keep_lines: bool = False) -> str:
    """Escape control characters and bytes that are not text, so that a name from a file cannot steer a terminal.

    Args:
        text: the text.
        keep_lines: keep line breaks, for messages of several lines.
    """
    return "".join(
        character if character.isprintable() or (keep_lines and character == "\n") else ascii(character)[1:-1]
        for character in text
    )


def redact_values(values: Any) -> Any:
    """Redact every string in a JSON-like structure of dicts and lists."""
    if isinstance(values, dict):
        return {key: redact_values(value) for key, value in values.items()}
    if isinstance(values, list):
        return [redact_values(value) for value in values]
    return redact(values) if isinstance(values, str) else values
