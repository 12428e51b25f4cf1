"""Secrets in what is published: names of options that hold them, and tokens, keys and credentials within texts.

The patterns ask for the shape of a secret, so that ordinary text stays as it is: "one token: a word" is no token.
"""

import re

# Words of a key that hold a secret wherever they stand, and endings of keys that do.
WORDS = {"password", "passwd", "pwd", "passphrase", "secret", "secrets", "credential", "credentials", "authorization"}
WORDS |= {"cookie", "cookies", "bearer", "netrc"}
ENDINGS = re.compile(
    r"(^|_)(token|auth|authentication|api_?key|access_?key(_?id)?|account_?key|private_?key|storage_options"
    r"|connection_string|sas)$"
)
# Tokens of a text, such as "<eos>".
SPECIAL_TOKEN = re.compile(r"(^|_)(eos|bos|pad|unk|cls|sep|mask|image|video|boi|eoi|query|begin|end)_token$")

PATTERNS = (
    # Of the Hub, GitHub, GitLab, Slack, Google, AWS, and of LLM providers.
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "hf_..."),
    (re.compile(r"\b(gh[pousr]_|github_pat_|glpat-|xox[abeprs]-|npm_)[A-Za-z0-9_-]{16,}"), r"\1..."),
    (re.compile(r"\bAIza[A-Za-z0-9_-]{30,}"), "AIza..."),
    (re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"), r"\1..."),
    (
        re.compile(r"\bsk-(?:[0-9a-f]{32,}|(?=[\w-]{0,99}\d)(?=[\w-]{0,99}[a-z])(?=[\w-]{0,99}[A-Z])[\w-]{20,})"),
        "sk-...",
    ),
    # JSON web tokens and private keys.
    (re.compile(r"\beyJ[\w-]{8,500}\.[\w-]{8,}\.[\w-]*"), "eyJ..."),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL), "..."),
    # User and password of an address.
    (re.compile(r"(?<=://)[^\s/?#]*@"), ""),
    # HTTP headers.
    (
        re.compile(r"(?i)\b(authorization[\"']?\s*[:=]\s*[\"']?)(?:(?:bearer|basic|token|digest)\s+)?[^\s\"',;}]+"),
        r"\1...",
    ),
    (re.compile(r"(?i)\b(bearer|basic)\s+(?=[\w.~+/=-]*[\d=]|[\w.~+/=-]{24,})[\w.~+/=-]{8,}"), r"\1 ..."),
    # Assignments: password=..., "password": "...", ?signature=..., aws_secret_access_key = ...
    (
        re.compile(
            r"(?i)((?:password|passwd|pwd|passphrase|secret|private_?key|(?:api|access|account|secret)[_-]?key"
            r"(?:[_-]?id)?|sig|signature|x-amz-[a-z-]{1,40})(?:=|\s=\s|[\"']\s*[:=]\s*))[\"']?[^\s\"',;&}]+[\"']?"
        ),
        r"\1...",
    ),
    (
        re.compile(r"(?i)(token(?:=|\s=\s|[\"']\s*[:=]\s*))[\"']?(?=[\w.~+/-]*\d)[\w.~+/-]{8,}[\"']?"),
        r"\1...",
    ),
)


def is_secret(key: str) -> bool:
    """Whether a key, such as the name of an option, names a secret: `hub_token`, `AWS_SECRET_ACCESS_KEY`, `apiKey`."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", key).lower()
    name = re.sub(r"[^a-z0-9]+", "_", name).strip("_")
    if SPECIAL_TOKEN.search(name):
        return False
    return not WORDS.isdisjoint(name.split("_")) or ENDINGS.search(name) is not None


def without_secrets(text: str) -> str:
    """A text with "..." in the place of tokens, keys, passwords and credentials."""
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    return text


__all__ = ["is_secret", "without_secrets"]
