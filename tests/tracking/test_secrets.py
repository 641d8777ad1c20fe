"""No secret of a config or of the environment reaches a file of the run folder or MLflow."""

import pytest
from whole_runs import Place

from dtrain.tracking import secrets
from dtrain.tracking.secrets import redacted_tree

SECRETS = ("hunter2-of-mine", "t0p-s3cr3t-token", "w0rd-in-an-address")
WRITTEN = ("tok-0f-the-file-4711", "two words of it", "31415926535", "key-in-a-list")  # as they are, in the file


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://me:s3cr3t!x@host/db",
        "http://s3cr3t!x@host",
        "http://me:a@s3cr3t!x@host/",
        "https://host/x?api_key=s3cr3t!x&y=1",
        "password: s3cr3t!x",
        '{"db_password": "s3cr3t!x"}',
        "AWS_SECRET_ACCESS_KEY=s3cr3t!x",
        "key s3cr3t!x of the environment",
    ],
)
def test_secrets_are_masked(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "s3cr3t!x")
    secrets._secrets_of_environment.cache_clear()
    masked = secrets.redact(text)
    secrets._secrets_of_environment.cache_clear()
    assert "s3cr3t" not in masked and "***" in masked


@pytest.mark.parametrize(
    "token", ["ghp_" + "a1B2" * 9, "hf_" + "abCD" * 8, "sk-" + "abcd1234" * 5, "AKIA" + "ABCD1234" * 2]
)
def test_tokens_are_known_by_how_they_begin(token: str) -> None:
    assert secrets.redact(f"push with {token}.") == "push with ***."


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/me/mlflow.db",
        "http://host:5000/?a=b@c",
        "num_tokens: 5, tokenizer: bpe, cls_token=True, monkey: 3",
        "task-something-rather-long, hf_some_long_identifier_name",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert secrets.redact(text) == text


def test_a_tree_is_masked_by_names_and_by_values():
    given = {"password": "abc", "x": [{"api_key": "k"}, "http://me:pw@host/", 3, None], "tokens": "fine", "token": ""}
    wanted = {"password": "***", "x": [{"api_key": "***"}, "http://***@host/", 3, None], "tokens": "fine", "token": ""}
    assert redacted_tree(given) == wanted


def test_words_of_a_model_are_left_alone_and_the_longest_secret_goes_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(secrets, "_known", set())
    secrets.keep_secret({"cls_token": "learnable", "pad_token": "<|endoftext|>", "a": {"password": "swordfish"}})
    secrets.keep_secret([{"secret": "swordfish-2024-x"}, {"api_key": ["abcdefgh"]}, {"token": "0a1b2c3d4e5f6a7b8c9d"}])
    text = "pos: learnable, <|endoftext|>, swordfish-2024-x, swordfish, abcdefgh, 0a1b2c3d4e5f6a7b8c9d"
    assert secrets.redact(text) == "pos: learnable, <|endoftext|>, ***, ***, ***, ***"
    assert set(secrets.secrets_for_child().values()) == secrets._known


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{'loss_per_token': 0.6931471805599453}", None),
        ("loss_per_token: 1.25e-05 and 1234567890123456789", None),
        ("+        cls_token = nn.functional.conv2d(x)", None),
        ("+        token = self.embedding_layer_1(x)", None),
        ("hf_token: hf0123456789abcdefghij", "hf_token: ***"),
        ('password: "two words"', 'password: "***"'),
        ('{"password": "ab\\"cd", "x": 1}', '{"password": "***", "x": 1}'),
        ("password=plain, next", "password=***, next"),
    ],
)
def test_what_a_text_keeps(text: str, expected: str | None):
    assert secrets.redact(text) == (expected or text)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("do", ["", "train 2 rank 0 raise"])
def test_nothing_that_a_run_leaves_holds_a_secret(place: Place, do: str) -> None:
    name = f"secret-{'failed' if do else 'done'}"
    place.write(
        "guarded.py",
        "from toy import Points\n\n\n"
        "class Guarded(Points):\n"
        "    def __init__(self, size, seed=0, password='', source='', note='', written=None):\n"
        "        super().__init__(size, seed)\n"
        f"        assert list(written.values()) == [{WRITTEN[0]!r}, {WRITTEN[1]!r}, {WRITTEN[2]}, [{WRITTEN[3]!r}]]\n"
        f"        assert password == {SECRETS[0]!r} and {SECRETS[2]!r} in source and {SECRETS[1]!r} in note\n",
    )
    changes = {
        "loaders": {
            "name": "Guarded", "batch_size": 4, "password": "${DATA_PASSWORD}", "note": "sent with ${MY_TOKEN}",
            "source": f"https://me:{SECRETS[2]}@host/data", "train": {"size": 8},
            "written": {
                "token": WRITTEN[0], "password": WRITTEN[1], "secret": int(WRITTEN[2]), "api_key": [WRITTEN[3]],
            },
        },
        "trainer.max_epochs": 1,
    }  # fmt: skip
    file = place.config(name, modules=["guarded", "toy"], **changes)
    database = place.folder / f"{name}.db"
    place.run(
        file, f"mlflow.tracking_uri=sqlite:///{database}", expect=1 if do else 0, do=do, mlflow=True,
        env={"DATA_PASSWORD": SECRETS[0], "MY_TOKEN": SECRETS[1]},
    )  # fmt: skip
    files = [path for path in [*place.path(name).rglob("*"), database] if path.is_file()]
    assert len(files) > 10
    found = [
        (path.name, secret) for path in files for secret in (*SECRETS, *WRITTEN) if secret.encode() in path.read_bytes()
    ]
    assert found == []
