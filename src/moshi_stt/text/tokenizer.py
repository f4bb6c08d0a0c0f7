"""The text tokenizer: token ids to the text of a word. Knows SentencePiece models and nothing of when a word begins or ends.

Contract section 5.6: 8,000 pieces (1B) or 4,000 (2.6B); a word's ids are decoded by themselves, so no space leads.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moshi_stt.errors import CheckpointError
from moshi_stt.install import install_command


class TextTokenizer:
    """A SentencePiece model read from a file."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError when the file or the sentencepiece package is not there, or the file is something else."""
        try:
            import sentencepiece
        except ImportError as error:
            raise CheckpointError(
                f"{path} is a SentencePiece model and the sentencepiece package is not installed. "
                f"Install it: {install_command('torch', ['sentencepiece'])}"
            ) from error
        if not path.is_file():
            raise CheckpointError(
                f"There is no text tokenizer at {path}. text_tokenizer_file must name a SentencePiece .model file."
            )
        processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise CheckpointError(
                f"{path} ({path.stat().st_size:,} bytes) is not a readable SentencePiece model: {error}. "
                "Fetch it again; an interrupted copy looks like this."
            ) from error
        self.path = path
        self._processor = processor
        self.pieces: int = processor.GetPieceSize()
        """Number of pieces; ids are 0 .. pieces - 1."""

    def __reduce__(self) -> "tuple[type[TextTokenizer], tuple[Path]]":
        return TextTokenizer, (self.path,)  # another process reads the file itself

    def check(self, text_card: int) -> None:
        """Raise CheckpointError unless the model's text vocabulary (`text_out_vocab_size`) is the tokenizer's."""
        if self.pieces != text_card:
            raise CheckpointError(
                f"The text tokenizer {self.path} has {self.pieces} pieces and the model has text_out_vocab_size = {text_card}. "
                "They must be equal: take both files from the same repository."
            )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one word's ids, without a leading space. Ids out of range raise IndexError."""
        text: str = self._processor.DecodeIds(list(ids))
        return text
