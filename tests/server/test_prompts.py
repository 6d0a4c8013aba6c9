"""What no model can read is refused, however it was asked."""

import pytest
from transformers import AutoTokenizer

from spieldose_server.errors import InvalidRequest
from spieldose_server.prompts import Prompts
from spieldose_server.request import Message, Prompt


@pytest.mark.parametrize("prompt", ["hé", [104, 195], [Message("user", "hé")]])
def test_a_token_without_an_embedding_is_refused(tiny_directory, prompt: Prompt) -> None:
    """Some tokenizers have more tokens than their model has embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_directory)
    whole = Prompts(tokenizer, vocabulary=len(tokenizer), max_bytes=1000)
    largest = max(whole.tokens("text", prompt))
    assert Prompts(tokenizer, vocabulary=largest + 1, max_bytes=1000).tokens("text", prompt)
    fewer = Prompts(tokenizer, vocabulary=largest, max_bytes=1000)
    with pytest.raises(InvalidRequest, match=f"expected ids below {largest}, got {largest}"):
        fewer.tokens("text", prompt)
