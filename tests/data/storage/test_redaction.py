"""What is shown of a URL holds no secret, wherever a message comes from; what holds none is shown as it is."""

import json

import pytest

from data.storage.location import DataError, checked_url, is_remote, local_path
from data.storage.redaction import escaped, redact, redact_values

SHOWN = {
    # users and passwords
    "https://user:secret@host:5000/path": "https://***@host:5000/path",
    "https://user:pa/ss@host/mine": "https://***@host/mine",
    "https://user:pa?ss#1@host/mine": "https://***@host/mine",
    "https://user:p@ss@host/mine": "https://***@host/mine",
    "https://user:p@ss/w@host/mine": "https://***@host/mine",
    "https://user:p%40ss%2Fw@host/mine": "https://***@host/mine",
    "https://user:pa'ss@host/mine": "https://***@host/mine",
    "https://user:12345@host/mine": "https://***@host/mine",
    "https://user:12/45@host/mine": "https://***@host/mine",
    "https://me@company.org:secret@host/mine": "https://***@host/mine",
    "https://token@host": "https://***@host",
    "https://user:pass word@host/mine": "https://***@host/mine",
    "data.path is s3://key:two more words@bucket/x, a URL": "data.path is s3://***@bucket/x, a URL",
    "https://user:@host": "https://***@host",
    "https://:secret@host": "https://***@host",
    "https://:@host": "https://***@host",
    "postgresql://user:sec/r@et@host/db": "postgresql://***@host/db",
    "postgresql+psycopg2://user:secret@/db?host=/var/run": "postgresql+psycopg2://***@/db?host=/var/run",
    "s3://AKIAEXAMPLE:wJalr/K7MD+EXAMPLE@bucket/mine": "s3://***@bucket/mine",
    "HTTPS://USER:SECRET@HOST/MINE": "HTTPS://***@HOST/MINE",
    "https://user:secret@[::1]:5000/mine": "https://***@[::1]:5000/mine",
    "simplecache::https://user:secret@host/mine": "simplecache::https://***@host/mine",
    "https:/user:secret@host/mine": "https:***@host/mine",
    "https:user:secret@host/mine": "https:***@host/mine",
    # fields of queries and fragments
    "s3://bucket/mine?token=abc": "s3://bucket/mine?token=***",
    "postgresql://host/db?user=u&password=secret&x=1": "postgresql://host/db?user=u&password=***&x=1",
    "postgresql://host/db?password=pa'ss&x=1": "postgresql://host/db?password=***&x=1",
    "https://host/a?X-Amz-Credential=AK%2Fus&X-Amz-Date=2026&X-Amz-Signature=0a1b&X-Amz-Security-Token=I%2F": (
        "https://host/a?X-Amz-Credential=***&X-Amz-Date=2026&X-Amz-Signature=***&X-Amz-Security-Token=***"
    ),
    "https://host/a?AWSAccessKeyId=AK&Signature=ab%3D&Expires=1": "https://host/a?AWSAccessKeyId=AK&Signature=***&Expires=1",
    "https://host/a?x-goog-signature=0a1b&x-goog-date=1": "https://host/a?x-goog-signature=***&x-goog-date=1",
    "https://account.blob.core.windows.net/a?sv=2024&sp=r&sig=ab%2Bc%3D": (
        "https://account.blob.core.windows.net/a?sv=2024&sp=r&sig=***"
    ),
    "https://host/a?key=AIza&alt=media": "https://host/a?key=***&alt=media",
    "https://host/#access_token=abc&state=1": "https://host/#access_token=***&state=1",
    "https://host/a?api-key=abc": "https://host/a?api-key=***",
    "https://host/a?API_KEY=abc": "https://host/a?API_KEY=***",
    "https://host/a?client_secret=abc": "https://host/a?client_secret=***",
    "https://host/login?next=https%3A%2F%2Fuser%3Asecret%40inner%2Fmine": (
        "https://host/login?next=https%3A%2F%2F***%40inner%2Fmine"
    ),
    "https://host/login?next=https%3A%2F%2Finner%2Fmine%3Ftoken%3Dabc%26x%3D1": (
        "https://host/login?next=https%3A%2F%2Finner%2Fmine%3Ftoken%3D***%26x%3D1"
    ),
    # settings of other kinds
    "AWS_SECRET_ACCESS_KEY=wJalr/K7 AWS_ACCESS_KEY_ID=AKIA": "AWS_SECRET_ACCESS_KEY=*** AWS_ACCESS_KEY_ID=AKIA",
    "AccountName=me;AccountKey=ab+c==": "AccountName=me;AccountKey=***",
    "host=db password='two words' user=me": "host=db password=*** user=me",
    "{'Authorization': 'Basic dXNlcjpzZWNyZXQ=', 'Accept': '*'}": "{'Authorization': 'Basic ***', 'Accept': '*'}",
    '{"token": "abc", "name": "x"}': '{"token": ***, "name": "x"}',
    # URLs in messages
    "uri: 'https://user:secret@host'\nother: a@b": "uri: 'https://***@host'\nother: a@b",
    "401, message='Unauthorized', url=URL('https://host/a?token=abc')": (
        "401, message='Unauthorized', url=URL('https://host/a?token=***')"
    ),
    "cannot copy https://u:p@a/x to s3://b/y?sig=abc: mail me@work": (
        "cannot copy https://***@a/x to s3://b/y?sig=***: mail me@work"
    ),
    "HTTPSConnectionPool(host='h', port=443): Max retries exceeded with url: /a?X-Amz-Signature=0a1b (Caused by X)": (
        "HTTPSConnectionPool(host='h', port=443): Max retries exceeded with url: /a?X-Amz-Signature=*** (Caused by X)"
    ),
}


@pytest.mark.parametrize(("text", "shown"), SHOWN.items())
def test_secrets_are_not_shown(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "https://host:5000/path",
        "https://host.org:5000/home/me@work/x",
        "http://localhost:5000/#/experiments/1@2",
        "http://[::1]:5000/a@b",
        "https://host/home/me@work/x",
        "https://host/a:b@c",
        "https://host/a?mail=a:b@c",
        "s3://bucket/me@work/images",
        "sqlite:////home/me@work/mlflow.db",
        "sqlite:///runs/a:b@c/mlflow.db",
        "file:///home/me@work/images",
        "/home/me@work/images",
        "runs/me@work: no checkpoint",
        "git@github.com:owner/project.git",
        "Signed-off-by: Ada Lovelace <ada@example.org>",
        "see http://host.org:80/x, or write to me@example.org",
        "cannot read https://host/x: ask me@example.org",
        "postgresql://host/db?user=u&x=1",
        "https://host/a?tokens=5&keyboard=us",
        "shard 00001.tar, key 000123",
        "the token is missing: set HF_TOKEN",
        "data.cache_gb=50, training.r1_gamma=0.05",
        "--set run.seed=3",
        "scaling.key=1",
    ],
)
def test_what_holds_no_secret_is_shown_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_values_are_redacted_one_by_one_whatever_quotes_they_hold() -> None:
    secret = 'https://user:pa"s\\s@host/?token=a"b'
    values = {"data": {"path": secret, "size": 3}, "more": [secret, None, True]}
    shown = redact_values(values)
    assert shown == {"data": {"path": redact(secret), "size": 3}, "more": [redact(secret), None, True]}
    assert json.loads(json.dumps(shown)) == shown
    assert "pa" not in redact(secret)


@pytest.mark.parametrize(
    "url",
    [
        "https:/user:hunter2@host/mine",
        "https:user:hunter2@host/mine",
        "user:hunter2@host/mine",
        "ftpx://user:hunter2@host/mine",
        "simplecache::https://user:hunter2@host/mine",
        "https://user:hunter2@host/mi\nne",
        "user:hunter2@host/mi\nne",
        "https://user:hunter2@host/mine?token=hunter2",
        "https://host/mine#token=hunter2",
        "s3:///user:hunter2@bucket",
    ],
)
def test_refused_url_is_named_without_its_secret(url: str) -> None:
    assert is_remote(url)
    with pytest.raises(DataError) as refused:
        checked_url(url)
    assert "hunter2" not in str(refused.value)
    assert "mi" in str(refused.value) or "bucket" in str(refused.value)


def test_refused_file_url_is_named_without_its_secret() -> None:
    with pytest.raises(DataError) as refused:
        local_path("file://user:hunter2@host/mine")
    assert "file://***@host/mine names no folder of this host" in str(refused.value)


def test_control_characters_are_escaped_and_lines_kept_where_wanted() -> None:
    text = "a\x1b]0;x\x07\r\u202eé\udc80\n"
    assert escaped(text) == r"a\x1b]0;x\x07\r\u202eé\udc80\n"
    assert escaped(text, keep_lines=True) == escaped(text)[:-2] + "\n"
    assert escaped(escaped(text)) == escaped(text)
    assert str(DataError("member \x1b[2J")) == r"member \x1b[2J"
