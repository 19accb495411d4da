"""The reasoner's character-level tokenizer and the files around it."""

from __future__ import annotations

from pathlib import Path

from ..files.writing import write_json, write_whole

PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = ("\n", *(chr(code) for code in range(32, 127)))
TAGS = ("<think>", "</think>")
VOCAB_SIZE = 112  # 4 + 96 + 2, rounded up to a multiple of 16

TOKEN_IDS = {token: i for i, token in enumerate((*SPECIALS, *CHARACTERS, *TAGS))}
THINK_ID, END_THINK_ID = TOKEN_IDS["<think>"], TOKEN_IDS["</think>"]

# The last user message without blanks, ended by "="; thinking is switched off by closing it.
CHAT_TEMPLATE = (
    "{%- set last = messages | selectattr('role', 'equalto', 'user') | list | last -%}"
    "{{- last['content'] | trim | replace(' ', '') | replace('=', '') -}}="
    "{%- if enable_thinking is defined and not enable_thinking -%}<think></think>{%- endif -%}"
)


def encode(text: str) -> list[int]:
    """Token ids of a text that holds no special token; tags are one token each."""
    ids, rest = [], text
    while rest:
        tag = next((tag for tag in TAGS if rest.startswith(tag)), None)
        token = tag or rest[0]
        ids.append(TOKEN_IDS.get(token, UNKNOWN))
        rest = rest[len(token) :]
    return ids


def decode(ids: list[int]) -> str:
    """Text of token ids without the special tokens."""
    names = list(TOKEN_IDS)
    return "".join(names[i] for i in ids if len(SPECIALS) <= i < len(names))


def write_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE

    vocab = {token: i for token, i in TOKEN_IDS.items() if token not in TAGS}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], unk_token=SPECIALS[UNKNOWN]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    write_whole(folder / "tokenizer.json", tokenizer.to_str(pretty=True), "tokenizer")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIALS[PAD],
        "bos_token": SPECIALS[BOS],
        "eos_token": SPECIALS[EOS],
        "unk_token": SPECIALS[UNKNOWN],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "do_sample": False,
        "max_new_tokens": 128,
    }
    for name, data in (("tokenizer_config", settings), ("generation_config", generation)):
        write_json(folder / f"{name}.json", data, "tokenizer")
