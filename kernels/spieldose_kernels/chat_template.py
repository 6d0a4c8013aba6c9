"""The chat template that an adapter may carry, as transformers will render it."""

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template


def check_chat_template(template: str) -> None:
    """Raise ValueError unless Jinja, with what transformers adds to it, compiles a template."""
    try:
        _compile_jinja_template(template)
    except TemplateError as error:
        raise ValueError(f"expected a chat template that compiles, got: {error}") from error
