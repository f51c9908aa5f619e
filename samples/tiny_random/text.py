"""Text and image encoders with random weights, and byte tokenizers, all made in code: nothing is downloaded."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WIDTH = 16
"""Width of every text encoder here."""
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Chat template of Qwen."""

_SPECIAL = re.compile(r"(<\|?\w+\|?>|\n\n)")
_AFTER = {"t5": "$A </s>", "clip": "<s> $A </s>", "llama": "<s> $A", "qwen": "$A"}


def byte_tokenizer(
    style: str, length: int, template: tuple[str, int] | None = None, chat: str | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer of UTF-8 bytes, so that any two texts differ.

    Args:
        style: which special tokens frame a text: "t5", "clip", "llama" or "qwen".
        length: longest text in tokens.
        template: a prompt template up to its placeholder, and how many tokens the pipeline expects it to be; as the
            pipelines cut off that many tokens, a tokenizer that counted otherwise would lose the prompt.
        chat: Jinja template for conversations.
    """
    special = ["<pad>", "<s>", "<unk>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=_AFTER[style], special_tokens=[("<s>", 1), ("</s>", 3)]
    )
    if template is not None:
        text, count = template
        pieces = template_pieces(text, count - int(style == "llama"))
        tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in dict.fromkeys(pieces)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
        padding_side="right",
        chat_template=chat,
    )


def template_pieces(text: str, count: int) -> list[str]:
    """Cut `text` into `count` consecutive pieces: markers stay whole, the longest part between them is divided."""
    parts = [part for marked in _SPECIAL.split(text) for part in (marked,) if part]
    longest = max(range(len(parts)), key=lambda i: len(parts[i]))
    pieces, body = count - len(parts) + 1, parts[longest]
    size = len(body) // pieces
    # All of one length but the last: pieces of two lengths could be taken for one another.
    cuts = [*range(0, size * pieces, size), len(body)]
    parts[longest : longest + 1] = [body[a:b] for a, b in pairwise(cuts)]
    return parts


def t5(tokenizer: PreTrainedTokenizerFast, multilingual: bool = False) -> Any:
    """A T5 encoder (UMT5 when `multilingual`) of one layer."""
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "d_model": WIDTH, "d_kv": 8, "d_ff": 2 * WIDTH, "num_layers": 1, "num_heads": 2,
        "dropout_rate": 0.0, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    return UMT5EncoderModel(UMT5Config(**sizes)) if multilingual else T5EncoderModel(T5Config(**sizes))


def clip_text(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    """The text half of CLIP, one layer, whose pooled output the pipelines use."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def decoder_sizes(tokenizer: PreTrainedTokenizerFast, layers: int = 3) -> dict[str, Any]:
    """Config values of a small decoder-only language model, as Llama, Qwen and Mistral name them."""
    return {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


def mrope_sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Config values of a small Qwen2.5-VL language model."""
    sizes = decoder_sizes(tokenizer) | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    del sizes["head_dim"]
    return sizes


def llama(tokenizer: PreTrainedTokenizerFast) -> LlamaModel:
    """A Llama of three layers."""
    return LlamaModel(LlamaConfig(**decoder_sizes(tokenizer)))


def clip_vision_config(side: int) -> CLIPVisionConfig:
    """CLIP vision of two layers that sees `side` x `side` pixels in patches of 2 x 2."""
    return CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=2, image_size=side,
        patch_size=2, projection_dim=WIDTH,
    )  # fmt: skip


def clip_vision(side: int) -> tuple[CLIPVisionModel, CLIPImageProcessor]:
    """An image encoder with `(side / 2)**2 + 1` tokens, and what prepares its images."""
    return CLIPVisionModel(clip_vision_config(side)), clip_images(side)


def clip_images(side: int) -> CLIPImageProcessor:
    """Resize and crop to `side` x `side` pixels."""
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
