from __future__ import annotations

from stts_export.training.clips import ANSWERS
from stts_export.training.tokenizer import VISUAL_TOKENS, answer_ids, build_tokenizer


def test_same_tokenizer_on_every_call():
    first, size = build_tokenizer()
    again, same_size = build_tokenizer()
    assert first.to_str() == again.to_str()
    assert size == same_size


def test_every_answer_is_one_token_of_its_own():
    tokenizer, size = build_tokenizer()
    ids = answer_ids(tokenizer)
    assert set(ids) == {word for words in ANSWERS.values() for word in words}
    assert len(set(ids.values())) == len(ids)
    for word, token in ids.items():
        assert token < size
        assert tokenizer.decode([token]) == word


def test_visual_tokens_follow_the_vocabulary_in_the_fixed_order():
    tokenizer, size = build_tokenizer()
    for index, name in enumerate(VISUAL_TOKENS):
        assert tokenizer.token_to_id(name) == size + index
    assert tokenizer.token_to_id("<im_patch>") == size + 2
    assert tokenizer.token_to_id("<frame_end>") == size + 8


def test_other_text_survives():
    tokenizer, _ = build_tokenizer()
    text = "Quel âge a-t-il? 你好 42.5\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
