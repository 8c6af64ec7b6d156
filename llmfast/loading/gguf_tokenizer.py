"""Make a transformers tokenizer from a GGUF file's vocabulary.

Two kinds exist: ``gpt2``, byte-level BPE with a list of merges, and ``llama``, SentencePiece's
BPE, whose merges follow from the scores. The file only names its pre-tokenizer
(``tokenizer.ggml.pre``). An unknown name is refused: a wrong split would give wrong tokens without
any sign of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gguf.constants import TokenType
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from ..errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from .gguf_file import GgufFile

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"  # GPT-2's
_CASED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# each pattern splits the pieces that the one before has left; text between matches is kept
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_WORDS,),
    "smollm": (r"\p{N}", _WORDS),
    "llama-bpe": (_CASED + r"\p{N}{1,3}" + _REST,),
    "qwen2": (_CASED + r"\p{N}" + _REST,),
}


def load_tokenizer(file: GgufFile, max_length: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer that ``file`` describes, for texts of up to ``max_length`` tokens.

    Raises:
        UserError: a kind or a pre-tokenizer that is not listed above, or a damaged vocabulary.
    """
    from transformers import PreTrainedTokenizerFast

    kind = _get(file, "model", str)
    if kind == "gpt2":
        pre = _get(file, "pre", str, "default")
        backend, add_bos = _byte_level(file, pre), pre == "llama-bpe"
    elif kind == "llama":
        backend, add_bos = _sentencepiece(file), True
    else:
        raise UserError(f"{file.path}: tokenizer {kind!r} cannot be read; gpt2 and llama can")
    tokens = _list(file, "tokens", str)
    types = _list(file, "token_type", int, [TokenType.NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise UserError(f"{file.path}: damaged, {len(tokens)} tokens but {len(types)} token types")
    _add_special_tokens(backend, tokens, types)

    named = {
        f"{name}_token": tokens[i]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (i := token_id(file, key)) is not None
    }
    named.setdefault("pad_token", named.get("eos_token"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **named,
        add_bos_token=_get(file, "add_bos_token", bool, add_bos),
        add_eos_token=_get(file, "add_eos_token", bool, False),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",  # a decoder continues at the right end
    )
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template
    return tokenizer


def token_id(file: GgufFile, name: str) -> int | None:
    """Return the id of the token ``name`` (``bos``, ``eot``, ...); None if the file has none."""
    value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    count = len(_list(file, "tokens", str))
    if value is not None and not (isinstance(value, int) and 0 <= value < count):
        raise UserError(
            f"{file.path}: damaged, tokenizer.ggml.{name}_token_id is {value!r}, but there are"
            f" {count} tokens"
        )
    return value


def _byte_level(file: GgufFile, pre: str) -> Tokenizer:
    if pre not in _SPLITS:
        raise UserError(
            f"{file.path}: pre-tokenizer {pre!r} (tokenizer.ggml.pre) is not known;"
            f" known are {', '.join(_SPLITS)}"
        )
    vocab = {token: i for i, token in enumerate(_list(file, "tokens", str))}
    merges = [tuple(merge.split(" ", 1)) for merge in _list(file, "merges", str)]
    if any(len(merge) != 2 for merge in merges):
        raise UserError(f"{file.path}: damaged vocabulary: a merge that does not name two tokens")
    # Llama 3 keeps a word that is a token, even where no merges lead to it
    backend = _bpe(file, vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in _SPLITS[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(file: GgufFile) -> Tokenizer:
    tokens = _list(file, "tokens", str)
    scores = _list(file, "scores", float)
    if len(scores) != len(tokens):
        raise UserError(f"{file.path}: damaged, {len(tokens)} tokens but {len(scores)} scores")
    unknown = token_id(file, "unknown")
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = _bpe(
        file,
        vocab=vocab,
        merges=_merges_from_scores(vocab, scores),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    prefix = _get(file, "add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), spaces] if prefix else [spaces]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """List the pairs of tokens that make a third, best score first: SentencePiece's order."""
    merges = []
    for token, i in vocab.items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(-scores[i], pair) for pair in pairs]
    merges.sort(key=lambda merge: merge[0])
    return [pair for _, pair in merges]


def _bpe(file: GgufFile, **kwargs: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(**kwargs))
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"{file.path}: damaged vocabulary: {error}") from error


def _add_special_tokens(backend: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Add control tokens, which no text contains, and user-defined ones, which are never split."""
    special = {TokenType.CONTROL, TokenType.UNKNOWN}
    backend.add_tokens(
        [
            AddedToken(token, special=kind in special, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in special or kind == TokenType.USER_DEFINED
        ]
    )


def _list(file: GgufFile, name: str, kind: type, default: Any = None) -> list[Any]:
    values: list[Any] = _get(file, name, list, default)
    if values and not isinstance(values[0], kind):  # an array has one type
        found = type(values[0]).__name__
        raise UserError(
            f"{file.path}: damaged, metadata key 'tokenizer.ggml.{name}' is a list of {found}"
        )
    return values


def _get(file: GgufFile, name: str, kind: type, default: Any = None) -> Any:
    key = f"tokenizer.ggml.{name}"
    value = file.metadata.get(key, default)
    if not isinstance(value, kind):
        found = "is missing" if value is None else f"is a {type(value).__name__}"
        raise UserError(f"{file.path}: damaged, metadata key {key!r} {found}")
    return value
