"""What is published holds no secrets, wherever they stand, and ordinary text is unchanged."""

import json

import pytest

from hf_vlm.hub.record import published
from hf_vlm.hub.secrets import is_secret, without_secrets

SECRET = "Zq7Xw2Lk9Pv4Rt6Yb1"


@pytest.mark.parametrize(
    "key",
    [
        *("token", "hub_token", "HF_TOKEN", "hfToken", "use_auth_token", "aws_session_token", "access-token"),
        *("password", "passwd", "db_passwd", "PWD", "passphrase", "password_hash", "userPassword"),
        *("secret", "client_secret", "clientSecretValue", "aws_secret_access_key", "secrets"),
        *("access_key", "aws_access_key_id", "AWSAccessKeyId", "accessKey", "api_key", "apiKey", "api-key", "APIKEY"),
        *("authorization", "Authorization", "Proxy-Authorization", "auth", "credentials", "google_credentials"),
        *("private_key", "storage_options", "cookie", "account_key", "connection_string"),
    ],
)
def test_keys_that_name_secrets(key: str) -> None:
    assert is_secret(key)
    assert published({"a": [{key: SECRET}]}) == {"a": [{}]}


@pytest.mark.parametrize(
    "key",
    [
        *("max_new_tokens", "tokenizer", "image_token_id", "num_query_tokens", "tokenizer_name", "skip_special_tokens"),
        *("eos_token", "pad_token", "image_token", "author", "authors", "key", "keys", "keyboard", "secretary"),
        *("average_tokens_across_devices", "include_num_input_tokens_seen", "monkey", "passes", "label_names"),
    ],
)
def test_keys_that_name_none(key: str) -> None:
    assert not is_secret(key)
    assert published({key: "a"}) == {key: "a"}


@pytest.mark.parametrize(
    "text",
    [
        f"see https://user:{SECRET}@host.example/a for more",
        f"see https://user:p@{SECRET}@host.example/a",
        f"s3://{SECRET}@bucket/a.tar and then some",
        f"two: https://a:{SECRET}@b/c https://d:{SECRET}@e/f",
        f"signed https://host/a.tar?X-Amz-Signature={SECRET}&x=1 here",
        f"signed https://host/a.tar?sig={SECRET} here",
        f"curl -H 'Authorization: Bearer {SECRET}'",
        f"Authorization: Basic {SECRET}==",
        f"authorization={SECRET}",
        f"headers Bearer {SECRET}",
        f"password={SECRET}",
        f"--password={SECRET} --lr 1",
        f"{{'passwd': '{SECRET}', 'a': 1}}",
        f'{{"api_key": "{SECRET}"}}',
        f"aws_secret_access_key = {SECRET}",
        f"access_key={SECRET}",
        f"host=h;AccountKey={SECRET};x",
        f"hub_token={SECRET}",
        f"'hub_token': '{SECRET}'",
        f"use hf_{SECRET} or gh" + f"p_{SECRET}",
        f"sk-proj-{SECRET}{SECRET}",
        f"key sk-ant-api03-{SECRET}-{SECRET}",
        f"xoxb-123-{SECRET}",
        f"glpat-{SECRET}",
        f"AIza{SECRET}{SECRET}",
        f"eyJhbGciOiJI.eyJzdWIiOiI{SECRET}.{SECRET}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_secrets_in_texts_are_removed(text: str) -> None:
    for value in (text, [text], [[text, {"a": (text,)}]], {"a": {"b": text}}, {text: 1}, {text}):
        assert SECRET not in json.dumps(published(value))
    assert without_secrets(without_secrets(text)) == without_secrets(text)


def test_access_keys_in_texts_are_removed() -> None:
    assert without_secrets("with AKIAIOSFODNN7EXAMPLE, then") == "with AKIA..., then"
    assert without_secrets("the rest https://u:p@host/a?x=1 stays") == "the rest https://host/a?x=1 stays"


def test_secrets_after_their_name_in_a_list_are_removed() -> None:
    assert published(["--hub_token", SECRET, "--lr", "1"]) == ["--hub_token", "...", "--lr", "1"]
    assert published([["password", SECRET], ["rate", "1"]]) == [["password", "..."], ["rate", "1"]]
    assert published(["a secret", "b", "token"]) == ["a secret", "b", "token"]


@pytest.mark.parametrize(
    "text",
    [
        "one token: a word",
        "Answer with a single token = one word.",
        "The password: what is it?",
        "eos_token=</s> pad_token=<pad> image_token=<image>",
        "a photo of a bearer of good news and basic characteristics",
        "basic misunderstandings, bearer transportation",
        "a mask-RCNN task-12345678901234567890 in sk-learn",
        "https://www.youtube.com/watch?v=abc123&t=5 is a video",
        "write to someone@host.example about it",
        "commit 8f14e45fceea167a5a36dedd4bea2543c1d2e3f4",
        "wheel:minilm",
        "org/name",
        "What is the secret of the picture? It has a key and a lock.",
        "tokens=1024 max_new_tokens=128",
        "signature dish = soup, design = flat",
        "cosine: lr=0.0001, beta2=0.98",
    ],
)
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert published(text) == text
    assert published([{"a": text}]) == [{"a": text}]


def test_long_texts_are_quick() -> None:
    """No pattern takes quadratic time."""
    for text in ("a" * 200_000, "://" * 60_000, "sk-" * 60_000, "eyJ" * 60_000, "token=" * 30_000, "bearer " * 30_000):
        without_secrets(text)
