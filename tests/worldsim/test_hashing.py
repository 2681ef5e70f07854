import pytest

from worldsim.hashing import code_hash, content_hash


def test_content_hash_sees_bytes_and_names_but_not_the_card_or_the_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "weights").write_bytes(b"123")
        (tmp_path / name / "CARD.md").write_text(name)
    first = content_hash(tmp_path / "a")
    assert content_hash(tmp_path / "b") == first
    (tmp_path / "b" / "sub" / "weights").write_bytes(b"124")
    assert content_hash(tmp_path / "b") != first
    (tmp_path / "a" / "sub" / "weights").rename(tmp_path / "a" / "weights")
    assert content_hash(tmp_path / "a") != first


def test_content_hash_of_one_file(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"x")
    (tmp_path / "b.zip").write_bytes(b"x")
    assert content_hash(tmp_path / "a.zip") == content_hash(tmp_path / "b.zip")
    with pytest.raises(ValueError, match="nowhere"):
        content_hash(tmp_path / "nowhere")


def test_code_hash_ignores_what_does_nothing(tmp_path):
    file = tmp_path / "code.py"
    hashes = []
    for text in [
        'def f(x):\n    """Doc."""\n    return x + 1\n',
        '"""Module."""\n\n\ndef f(x):  # comment\n    """Other."""\n    return (x + 1)\n',
        "def f(x):\n    return x + 2\n",
    ]:
        file.write_text(text)
        hashes.append(code_hash([tmp_path]))
    assert hashes[0] == hashes[1] != hashes[2]
    assert code_hash([file]) == hashes[2]
