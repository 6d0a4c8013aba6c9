"""What a base can take of an example."""

from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class Limits:
    """Hold how many tokens a base reads in a row, and which it knows."""

    positions: int | None = None  # None: no number is too large
    vocabulary: int | None = None  # rows of its embedding, which token ids are below

    @classmethod
    def of(cls, base: PretrainedConfig) -> "Limits":
        """Read a base's limits from its configuration."""
        text = base.get_text_config()
        return cls(
            getattr(text, "max_position_embeddings", None), getattr(text, "vocab_size", None)
        )

    def length(self, asked: int) -> int:
        """Return the tokens of the longest example where so many are asked for."""
        return min(asked, self.positions or asked)


NO_LIMITS = Limits()
