"""Text features: real words alone count, whatever the batch."""

import sys
from types import SimpleNamespace

import pytest
import torch

from wfm_core.models.text import ByteTextConfig, ByteTextEncoder, T5TextEncoder, load_text_encoder

SMALL = ByteTextConfig(width=16, num_layers=2, num_heads=2, max_bytes=24)


def test_a_batch_of_texts_equals_its_texts():
    encoder = ByteTextEncoder(SMALL)
    texts = ["put the carrot down", "", "lift", "öffne"]
    together = encoder(texts)
    assert together.shape == (4, 19, 16) and encoder.feature_dim == 16
    for row, text in enumerate(texts):
        length = len(text.encode())
        assert not together[row, length:].any() and together[row].isfinite().all()
        if length:
            assert together[row, :length].any(dim=-1).all()
            torch.testing.assert_close(encoder([text])[0], together[row, :length])
    assert encoder([""]).shape == (1, 1, 16)


def test_every_byte_and_its_place_tell():
    encoder = ByteTextEncoder(SMALL)
    plain, other, turned = encoder(["ab cd", "ab ce", "ba cd"])
    assert ((plain - other).abs().amax(dim=-1) > 1e-4).all()  # each word knows of all others
    assert ((plain - turned).abs().amax(dim=-1) > 1e-4).all()
    assert (plain[2:] - turned[2:]).abs().max() > 1e-4


def test_encoders_of_the_same_seed_are_the_same_wherever_built():
    torch.manual_seed(1)
    one = ByteTextEncoder(SMALL)
    torch.manual_seed(2)
    assert torch.equal(one(["a"]), ByteTextEncoder(SMALL)(["a"]))
    assert not torch.equal(one(["a"]), ByteTextEncoder(ByteTextConfig(16, 2, 2, 24, seed=1))(["a"]))


def test_long_texts_are_refused():
    encoder = ByteTextEncoder(SMALL)
    assert encoder(["x" * 24]).shape == (1, 24, 16)
    with pytest.raises(ValueError, match="at most 24 bytes, got 26"):
        encoder(["ö" * 13])


def test_bytes_need_no_files():
    encoder = load_text_encoder("bytes")
    assert isinstance(encoder, ByteTextEncoder) and not any(p.requires_grad for p in encoder.parameters())
    assert encoder(["open the drawer"]).shape == (1, 15, encoder.feature_dim)


def test_a_t5_folder_needs_transformers(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'bytes' or a folder .* got 'byte'"):
        load_text_encoder("byte")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"pip install 'transformers\[sentencepiece\]'"):
        load_text_encoder(str(tmp_path))


def test_t5_features_are_zero_where_a_text_has_ended(tmp_path, monkeypatch):
    """Against a stand-in for the library: a piece a word, features that count the pieces."""
    read = []

    class Loader:
        def from_pretrained(self, folder, *, local_files_only):
            assert local_files_only
            read.append(folder)
            return self

    class Tokenizer(Loader):
        def __call__(self, texts, *, padding, return_tensors):
            lengths = [len(text.split()) for text in texts]
            mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            return {"input_ids": mask * 7, "attention_mask": mask.long()}

    class Encoder(Loader):
        config = SimpleNamespace(d_model=3)

        def eval(self):
            return self

        def __call__(self, *, input_ids, attention_mask):
            return SimpleNamespace(last_hidden_state=input_ids[..., None] + attention_mask.sum() + torch.ones(3))

    library = SimpleNamespace(AutoTokenizer=Tokenizer(), T5EncoderModel=Encoder())
    monkeypatch.setitem(sys.modules, "transformers", library)
    (tmp_path / "config.json").write_text("{}")
    encoder = load_text_encoder(str(tmp_path))
    assert encoder.feature_dim == 3 and read == [tmp_path, tmp_path]
    features = encoder(["open", "close the drawer"])
    expected = torch.tensor([[12.0, 0, 0], [12, 12, 12]])
    assert torch.equal(features, expected[..., None].expand(-1, -1, 3))
    with pytest.raises(ValueError, match="at most 2 pieces, got 3"):
        T5TextEncoder(tmp_path, max_words=2)(["close the drawer"])
