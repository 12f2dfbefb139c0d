"""A small byte-level tokenizer for the synthetic questions, laid out like Molmo2's."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as InOrder
from tokenizers.trainers import BpeTrainer

from stts_export.training.clips import ANSWERS, COLOURS, PHRASES, SHAPES

PAD, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TOKENS = (PAD, CHAT_START, CHAT_END)
# Order fixed by `olmo/tokenizer.py: EXTRA_TOKENS` (spec 1.5).
VISUAL_TOKENS = (
    "<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<|image|>",
    "<im_low>", "<frame_start>", "<frame_end>", "<|video|>", "<|points|>", "<|token_index|>",
    "<|vit_index|>", "<|vit_loc|>",
)  # fmt: skip
_VOCAB_LIMIT = 512
# A printed time with the spaces around it is one piece, so that it can become one token: a small
# decoder then reads the time of a frame from the token before it.
_PIECES = r" ?\d+\.\d ?| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
_LONGEST_SECONDS = 16


def build_tokenizer() -> tuple[Tokenizer, int]:
    """Train the tokenizer; the same result on every call.

    Returns:
        The tokenizer and its size without `VISUAL_TOKENS`, which have the ids from there on.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = InOrder(
        [
            Split(Regex(_PIECES), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=_VOCAB_LIMIT,
        min_frequency=2,
        special_tokens=list(CHAT_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    size: int = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in VISUAL_TOKENS])
    return tokenizer, size


def answer_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the one token of every answer.

    Raises:
        ValueError: an answer is more than one token.
    """
    ids = {}
    for words in ANSWERS.values():
        for word in words:
            tokens = tokenizer.encode(word, add_special_tokens=False).ids
            if len(tokens) != 1:
                raise ValueError(f"the answer {word!r} is {len(tokens)} tokens, not one")
            ids[word] = tokens[0]
    return ids


def save_tokenizer_files(tokenizer: Tokenizer, folder: Path, max_frames: int) -> None:
    """Write the tokenizer and the small JSON files around it in the Hugging Face layout."""
    tokenizer.save(str(folder / "tokenizer.json"))
    end, pad = tokenizer.token_to_id(CHAT_END), tokenizer.token_to_id(PAD)
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": CHAT_END,
            "eos_token": CHAT_END,
            "pad_token": PAD,
        },
        "generation_config.json": {
            "bos_token_id": end,
            "eos_token_id": end,
            "pad_token_id": pad,
        },
        "processor_config.json": {"use_frame_special_tokens": True},
        "video_preprocessor_config.json": {
            "frame_sample_mode": "uniform_last_frame",
            "num_frames": max_frames,
            "max_fps": 2.0,
            "sampling_fps": 2,
        },
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _corpus() -> list[str]:
    """Return texts with every word of questions, answers and prompts, each at least twice."""
    answers = sorted({word for words in ANSWERS.values() for word in words})
    named = [
        *SHAPES,
        *COLOURS,
        "moving object",
        *(f"{colour} {kind}" for colour in COLOURS for kind in (*SHAPES, "object")),
    ]
    questions = [
        phrase.format(name, name)
        for phrases in PHRASES.values()
        for phrase in phrases
        for name in named
    ]
    times = [f" {half / 2:.1f} " for half in range(2 * _LONGEST_SECONDS)]
    return [*(answers * 3), *questions, *(["0.0 ", *times, "user\n", "assistant\n"] * 3)]
