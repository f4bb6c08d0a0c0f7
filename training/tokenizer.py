"""The small model's own SentencePiece model: each word of its vocabulary is one piece, and so is every letter."""

from pathlib import Path

from training.vocabulary import all_phrases, words

UNK, BOS, EOS, PAD = 0, 1, 2, 3
"""Ids as in Kyutai's tokenizers: 0 is also the word boundary and 3 the padding of the text stream (contract section 5.6)."""


def train_tokenizer(out: Path, pieces: int = 448) -> int:
    """Write a model to `out`; returns how many pieces it has. Deterministic."""
    import sentencepiece

    vocabulary = words(all_phrases())
    corpus = [*all_phrases(), *(word[::-1] for word in vocabulary)]  # backwards: so that letters and pairs become pieces, too
    prefix = out.with_suffix("")
    out.parent.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(prefix),
        model_type="unigram",
        vocab_size=pieces,
        hard_vocab_limit=False,
        user_defined_symbols=[f"▁{word}" for word in vocabulary],
        character_coverage=1.0,
        split_by_whitespace=True,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=PAD,
        num_threads=1,
        minloglevel=2,
        normalization_rule_name="identity",
    )
    prefix.with_suffix(".vocab").unlink()
    return load(out).GetPieceSize()


def load(path: Path):  # type: ignore[no-untyped-def]
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(path.read_bytes())
    return processor


def pieces_of(path: Path) -> dict[str, list[int]]:
    """The ids of every word of the vocabulary."""
    processor = load(path)
    return {word: list(processor.EncodeAsIds(word)) for word in words(all_phrases())}
