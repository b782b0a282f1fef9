"""What may be shown of a text: passwords, tokens and keys in it are replaced by ***."""

import re
from typing import Any

_HOST_AND_PORT = r"(?:[^/?\#\s:@]*@)?(?:localhost|[\w-]+\.[\w.-]+|\[[\da-f:.]+\]):\d{1,5}(?:[/?\#\s]|$)"


_USER = re.compile(
    rf"""(?ix)
    (?<=://) (?:
        (?!{_HOST_AND_PORT}) [^/?\#\s:]* : \S* @  # user:password@; people write / ? \# and @ in it as they are
        | [^/?\#\s]* @                            # token@, me@company:password@
    )
    | (?<=%3a%2f%2f) (?: (?:(?!%2f|%3a)[^/\s&])* %3a [^\s&]* | (?:(?!%2f)[^/\s&])* ) %40  # in a URL in a URL
    | (?:(?<=\bhttp:)|(?<=\bhttps:)|(?<=\bs3:)) (?:/|///)? [^/?\#\s:@]+ : \S+ @  # too few or too many slashes
    """
)
"""What comes before a host. A raw slash in a password makes the URL invalid, which is shown to the user all the same;
therefore a short name with a number, as in `mlflow:5000/a@b`, counts as a user and not as a host with its port."""


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
"""name=value of a query, of a database's connection string or of an environment, 'name': 'value', and HTTP's header."""


_ENCODED_FIELDS = re.compile(r"(?i)((?:password|secret|token|credential|signature|key|sig)%3d)(?:(?!%26)[^&\s'\"])+")


def _hidden(user: re.Match[str]) -> str:
    return "***%40" if user[0].endswith("%40") else "***@"


def redact(text: str) -> str:
    """The text with what may be secret in it replaced by ***: users and passwords of URLs, and secret fields.

    Works on a URL as on a message with several. In doubt more is hidden: up to the last @ without a blank before it,
    where a password begins. Text without such a URL or field comes back as it is; so does what this function gave.
    """
    text = _USER.sub(_hidden, text)
    return _ENCODED_FIELDS.sub(r"\1***", _SECRET_FIELDS.sub(r"\g<name>***", text))


def redact_values(values: Any) -> Any:
    """A structure of dicts and lists, as JSON has them, with each text in it redacted."""
    if isinstance(values, dict):
        return {key: redact_values(value) for key, value in values.items()}
    if isinstance(values, list):
        return [redact_values(value) for value in values]
    return redact(values) if isinstance(values, str) else values
