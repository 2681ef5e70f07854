"""Features of instructions, for the text attention of the Llama-style decoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wfm_core.models.transformer_blocks import Attention, RMSNorm, SwiGLU, whole


class TextEncoder(Protocol):
    """Turns texts into features."""

    feature_dim: int
    """D of the features; the decoder's `text_dim`."""
    max_words: int
    """W at most."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Encode B texts to features (B, W, D), all zero after the end of a text."""
        ...


def pooled(features: Tensor) -> Tensor:
    """Mean (B, D) over the words of features (B, W, D), which are zero where there is none."""
    words = (features != 0).any(dim=-1).sum(dim=1, keepdim=True)
    return features.sum(dim=1) / words.clamp(min=1)


@dataclass(frozen=True)
class ByteTextConfig:
    """Sizes of a `ByteTextEncoder`; texts are at most `max_bytes` long in UTF-8, `seed` is that of its weights."""

    width: int = 256
    num_layers: int = 2
    num_heads: int = 4
    max_bytes: int = 128
    seed: int = 0


class ByteTextEncoder(nn.Module):
    """Reads the bytes of a text: an embedding and a few transformer layers, no vocabulary, no files.

    The weights are drawn from a seed, so they are the same wherever the encoder is built: frozen, it gives each text
    features of its own; it may also be trained.
    """

    def __init__(self, config: ByteTextConfig | None = None) -> None:
        super().__init__()
        self.config = config = ByteTextConfig() if config is None else config
        self.feature_dim = width = config.width
        self.max_words = config.max_bytes
        self.embed = nn.Embedding(256, width)
        self.position = nn.Parameter(torch.empty(config.max_bytes, width))
        self.layers = nn.ModuleList(_Layer(width, config.num_heads) for _ in range(config.num_layers))
        self.norm = RMSNorm(width)
        generator = torch.Generator().manual_seed(config.seed)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=width**-0.5, generator=generator)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Encode B texts to features (B, W, D), W the longest's bytes but at least 1, all zero after a text's end.

        Raises:
            ValueError: a text is longer than `max_bytes`.
        """
        coded = [text.encode() for text in texts]
        longest = max(1, *map(len, coded))
        if longest > self.config.max_bytes:
            raise ValueError(f"a text must have at most {self.config.max_bytes} bytes, got {longest}")
        padded = torch.tensor([list(code.ljust(longest, b"\0")) for code in coded], device=self.position.device)
        lengths = torch.tensor([len(code) for code in coded], device=self.position.device)
        real = torch.arange(longest, device=self.position.device) < lengths[:, None]  # (B, W)
        # An empty text sees its padding, or it would see nothing at all; its features are zero all the same.
        visible = real | (lengths == 0)[:, None]
        bias = torch.zeros_like(real, dtype=self.position.dtype).masked_fill(~visible, float("-inf"))[:, None, None]
        x = self.embed(padded) + self.position[:longest]
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x) * real[..., None]


class _Layer(nn.Module):
    """Self-attention and a gated network, each after a norm."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attention = Attention(width, width, num_heads, num_heads, width // num_heads)
        self.norm2 = RMSNorm(width)
        self.ffn = SwiGLU(width, 2 * width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map (B, W, D) to the same shape, with an additive bias (B, 1, 1, W)."""
        normed = self.norm1(x)
        seen = torch.stack(self.attention.keys_values(normed), dim=1)
        x = x + self.attention.mix(self.attention.queries(normed), seen, whole(x.shape[1], bias))
        return x + self.ffn(self.norm2(x))


class T5TextEncoder:
    """The encoder of a T5 model, frozen, from a folder in the format of `transformers`.

    Raises:
        ImportError: `transformers` is not installed.
    """

    def __init__(self, folder: Path, max_words: int = 512) -> None:
        try:
            import transformers
        except ImportError as error:
            raise ImportError(
                f"reading the T5 folder {folder} needs transformers: pip install 'transformers[sentencepiece]'"
            ) from error
        self.max_words = max_words
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.encoder: Any = transformers.T5EncoderModel.from_pretrained(folder, local_files_only=True).eval()
        self.feature_dim: int = self.encoder.config.d_model

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Encode B texts to features (B, W, D), W the longest's pieces, all zero after a text's end.

        Raises:
            ValueError: a text has more than `max_words` pieces.
        """
        pieces = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        if pieces["input_ids"].shape[1] > self.max_words:
            raise ValueError(f"a text must have at most {self.max_words} pieces, got {pieces['input_ids'].shape[1]}")
        mask = pieces["attention_mask"]
        features = self.encoder(input_ids=pieces["input_ids"], attention_mask=mask).last_hidden_state
        return features * mask[..., None]


def load_text_encoder(spec: str) -> TextEncoder:
    """Build a text encoder: "bytes", or the path of a T5 folder, which is read only now.

    Raises:
        ValueError: neither.
        ImportError: a T5 folder, but `transformers` is not installed; says how to install it.
    """
    if spec == "bytes":
        return ByteTextEncoder().eval().requires_grad_(False)
    if not (Path(spec) / "config.json").is_file():
        raise ValueError(f"text encoder must be 'bytes' or a folder with a T5 model's config.json, got {spec!r}")
    return T5TextEncoder(Path(spec))
